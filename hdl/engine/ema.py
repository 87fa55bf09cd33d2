"""An exponential moving average of the adapter (train.ema), kept beside the master weights: diffusers' EMAModel.

Every rank averages its own flat partitions (hdl/engine/partitions.py), in float32 whatever the master's dtype is and
where the master is, so that no step gathers anything, on any ZeRO stage. EMAModel would gather by itself where
transformers has been told of ZeRO-3, which hdl never does.

    average <- average - (1 - d) (average - weights)    after the k-th update, k = 0, 1, ...
    d = 0 for k = 0, else min(train.ema, (1 + k) / (10 + k))

That ramp is EMAModel's default: the average covers about the last ninth of the updates so far, until train.ema limits
it, which 0.99 does after 890 updates and 0.999 after 8,990. Its use_ema_warmup is for longer runs: within the first
thousand updates it forgets a run's beginning more slowly.

An update is averaged once it is known that it was taken, when the next step's gradient has been queued already and
its optimizer has not: the weights are still those of that update, and nobody waits. What hdl/engine/skipping.py
drops is not averaged.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from deepspeed import DeepSpeedEngine
from torch import Tensor, nn

from hdl.adapter.flat import in_flat
from hdl.engine.full_state import places
from hdl.engine.partitions import flat_partitions, is_zero3

PIECE = 2**22  # numbers that are averaged at a time: what EMAModel takes for a moment is at most 32 MiB


class Average:
    """`flats`: of each of this rank's partitions, its average in float32. It starts as what is there now."""

    def __init__(self, engine: DeepSpeedEngine, decay: float) -> None:
        """decay: train.ema, above 0."""
        from diffusers.training_utils import EMAModel  # brings its pipelines, and is only of use here

        self.engine = engine
        self.flats = [flat.detach().to(torch.float32, copy=True) for flat in flat_partitions(engine)]
        self._model = EMAModel([], decay=decay)
        self._model.shadow_params = [p.data for p in _pieces(self.flats)]  # views: EMAModel would take copies

    @property
    def updates(self) -> int:
        """How many have been averaged."""
        return int(self._model.optimization_step)

    def update(self) -> None:
        """Queue what takes the weights of now into the average."""
        self._model.step(_pieces(flat_partitions(self.engine)))

    @torch.no_grad()
    def restore(self, averaged: dict[str, Tensor], updates: int) -> None:
        """Go on from a checkpoint's, named as hdl.adapter.lora.read_adapter has it."""
        values = in_flat(self.engine.module, averaged)
        rank = dist.get_rank(self.engine.optimizer.dp_process_group)
        for name, place in places(self.engine).items():
            place.put(values[name], self.flats, rank)
        self._model.optimization_step = updates

    @contextmanager
    def in_the_model(self) -> Iterator[None]:
        """The model computes with the average, rounded to its dtype, and afterwards with its own weights again, to
        the bit. Every rank does this together, between steps."""
        mine = list(_pieces(_computed_with(self.engine)))
        with _written_to(self.engine):
            self._model.store(mine)
            self._model.copy_to(mine)
        yield  # an error ends the run: to bring the weights back, this rank would wait for others that go on
        with _written_to(self.engine):
            self._model.restore(mine)


def _pieces(flats: Iterable[Tensor]) -> Iterator[nn.Parameter]:
    """Views of flat tensors as EMAModel takes them: it copies what is no parameter, and averages what is one."""
    for flat in flats:
        yield from (nn.Parameter(piece) for piece in flat.detach().view(-1).split(PIECE))


def _computed_with(engine: DeepSpeedEngine) -> list[Tensor]:
    """This rank's parts of what the model computes with. With a master of the same dtype they may be the master."""
    zero = engine.optimizer
    if is_zero3(engine):
        return list(zero.fp16_partitioned_groups_flat)
    rank = dist.get_rank(zero.dp_process_group)
    return [parts[rank] for parts in zero.parallel_partitioned_bit16_groups]


@contextmanager
def _written_to(engine: DeepSpeedEngine) -> Iterator[None]:
    """What is written to these parts comes to where the model reads it, on all ranks, as after DeepSpeed's step."""
    zero = engine.optimizer
    if is_zero3(engine):
        zero.checkpoint_event_prologue()  # no parameter is whole
        yield
        zero.checkpoint_event_epilogue()  # those that stay whole are; others will be gathered when they are used
        return
    yield
    rank = dist.get_rank(zero.dp_process_group)
    for whole, parts in zip(zero.bit16_groups_flat, zero.parallel_partitioned_bit16_groups):
        dist.all_gather_into_tensor(whole, parts[rank].clone(), group=zero.dp_process_group)
