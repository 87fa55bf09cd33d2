"""What the ranks of tests/memory/test_shares.py do: each check is run by all of them, every rank with samples of its own,
and held to the same linears where they are."""

import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from hdl.adapter.lora import adapter_parameters, attach
from hdl.config import Lora
from hdl.kernels.fuse import FORMS, STREAMED, FusedDecoder, fuse, fuse_with
from hdl.kernels.scratch import Scratch
from hdl.memory.shares import Gatherer
from hdl.memory.streaming import spread
from hdl.o1.checkpoint import Checkpoint, load_model, open_checkpoint
from tests.kernels.test_fused import DEVICE, EQUAL, MIXED, SMALL, Case, adapted_model

LAYERS = 5
CONFIG = replace(SMALL, num_hidden_layers=LAYERS)


class Group:
    """The ranks, as hdl.engine.processes.Processes has them."""

    def gather(self, thing: Any) -> list[Any]:
        things = [None] * dist.get_world_size()
        dist.all_gather_object(things, thing)
        return things

    def all_or_none(self, error: Exception | None) -> None:
        if any(self.gather(error)):
            raise RuntimeError(self.gather(error))


def pair(form: str, shard: int, keep: str = "everything") -> tuple[PeftModel, PeftModel]:
    """A model whose layers are shared out, and the same linears where they are."""
    model, same = adapted_model(CONFIG), adapted_model(CONFIG)
    fuse(model, weights=form, keep=keep, shard=shard, ranks=Group())
    scratch, chosen = Scratch(), spread(shard, LAYERS)
    kinds = [partial(STREAMED[form] if i in chosen else FORMS[form], scratch=scratch) for i in range(LAYERS)]
    fuse_with(same, kinds, keep)
    return model, same


def own_cases() -> list[Case]:
    """Other samples on every rank, and of other sizes."""
    rank = dist.get_rank()
    return [
        Case(CONFIG, [MIXED, EQUAL][(rank + i) % 2][: 4 - rank % 3], seed=10 * rank + i) for i in range(2)
    ]


def drawn(model: PeftModel, case: Case) -> Tensor:
    with torch.no_grad(), model.disable_adapter():
        return model(case.text, case.z, case.t, case.layout)


def assert_same_steps(model: PeftModel, same: PeftModel, cases: list[Case]) -> None:
    for case in cases:
        (x_pred, gradients), (wanted, wanted_gradients) = case.run(model), case.run(same)
        assert torch.equal(x_pred, wanted)
        assert all(torch.equal(gradients[name], wanted_gradients[name]) for name in wanted_gradients)
        for m in (model, same):
            for p in adapter_parameters(m).values():
                p.data.mul_(-0.7)


def changes_no_bit(form: str, shard: int, keep: str = "everything") -> None:
    """Steps, with drawing in between."""
    model, same = pair(form, shard, keep)
    first, second = own_cases()
    assert_same_steps(model, same, [first, second])
    assert torch.equal(drawn(model, first), drawn(same, first))
    assert torch.equal(drawn(model, second), drawn(same, second))
    assert_same_steps(model, same, [second, first])


def any_order(form: str) -> None:
    """A forward that nobody goes back from, and two before the first backward."""
    results = []
    for model in pair(form, LAYERS):
        first, second = own_cases()
        model(first.text, first.z, first.t, first.layout)
        x, y = (model(c.text, c.z, c.t, c.layout) for c in (first, second))
        (x.square().sum() + 2 * y.square().sum()).backward()
        results.append((x.detach(), y.detach(), *(p.grad for p in model.parameters() if p.grad is not None)))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def each_keeps_its_share() -> None:
    model, _ = pair("full", LAYERS)
    world = dist.get_world_size()
    streaming = decoder_of(model).streaming
    slot = streaming.slots[0].nbytes
    held = sum(
        {b.untyped_storage().data_ptr(): b.untyped_storage().nbytes() for b in streaming._blocks}.values()
    )
    assert held == LAYERS * slot // world, (held, slot)
    numbers = sum(module.weight.numel() for module in frozen(model, 0))
    assert 4 * numbers <= slot < 4 * numbers + 4 * 256 + world * 256
    assert all(
        module.weight.untyped_storage().nbytes() == 4 for i in range(LAYERS) for module in frozen(model, i)
    )


def one_gather_a_layer() -> None:
    """And none that the slots make needless."""
    model, _ = pair("full", LAYERS)
    counted, plain = [], Gatherer.copy

    def copy(self: Gatherer, slot: Tensor, share: Tensor) -> Any:
        counted.append(slot.nbytes)
        return plain(self, slot, share)

    Gatherer.copy = copy  # type: ignore[method-assign]
    try:
        for _ in range(3):
            own_cases()[0].run(model)
    finally:
        Gatherer.copy = plain  # type: ignore[method-assign]
    assert len(counted) == 2 + 3 * (2 * LAYERS - 4), counted


def reads_its_layers_alone(base: str) -> None:
    """Weights come from the checkpoint, each of them to one rank."""
    read: list[str] = []
    plain = Checkpoint.read

    def counted(self: Checkpoint, name: str, *where: Any) -> Tensor:
        read.append(name)
        return plain(self, name, *where)

    Checkpoint.read = counted  # type: ignore[method-assign]
    try:
        models = []
        for absent in (True, False):
            lora = Lora(rank=4)
            loaded = load_model(open_checkpoint(base), DEVICE, torch.float32, absent)
            models.append(attach(loaded, lora, "base", 0))
        fuse(models[0], weights="fp8", shard=4, ranks=Group())
    finally:
        Checkpoint.read = plain  # type: ignore[method-assign]
    everyone = Group().gather(read)
    names = [name for names in everyone for name in names]
    layers = len(models[0].get_base_model().model.language_model.layers)  # type: ignore[union-attr,operator,arg-type]
    assert len(set(names)) == len(names) == 7 * layers
    assert max(map(len, everyone)) <= 7 * -(-layers // dist.get_world_size())
    scratch = Scratch()
    fuse_with(models[1], partial(STREAMED["fp8"], scratch=scratch), "everything")
    case = Case(replace(SMALL, hidden_size=64), MIXED)
    assert torch.equal(case.run(models[0])[0], case.run(models[1])[0])


def frozen(model: PeftModel, layer: int) -> list[torch.nn.Linear]:
    return [m for n, m in model.named_modules() if f".layers.{layer}." in n and n.endswith("base_layer")]  # type: ignore[misc]


def decoder_of(model: PeftModel) -> FusedDecoder:
    return model.get_submodule("base_model.model.model.language_model").forward.__self__  # type: ignore[union-attr]


def checks(base: str) -> dict[str, Callable[[], None]]:
    found: dict[str, Callable[[], None]] = {
        f"{form} {shard}": partial(changes_no_bit, form, shard)
        for form, shards in (("full", (1, 2, 3, 5)), ("fp8", (3, 5)), ("fp8_stored", (5,)), ("nf4", (4,)))
        for shard in shards
    }
    found |= {f"{keep} fp8 4": partial(changes_no_bit, "fp8", 4, keep) for keep in ("products", "input")}
    found |= {f"any order {form}": partial(any_order, form) for form in ("full", "fp8")}
    found["each keeps its share"] = each_keeps_its_share
    found["one gather a layer"] = one_gather_a_layer
    found["reads its layers alone"] = partial(reads_its_layers_alone, base)
    return found


def main(rank: int, world: int, folder: str, base: str) -> None:
    os.environ["TRITON_INTERPRET"] = "0"
    torch.set_num_threads(1)
    store = dist.FileStore(f"{folder}/store", world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    for name, check in checks(base).items():
        problem = ""
        try:
            check()
        except Exception:
            problem = traceback.format_exc()
        Path(folder, f"{rank} {name}").write_text(problem or "passed")
        if any(Group().gather(problem)):
            break  # the ranks may not be at the same place any more
    dist.destroy_process_group()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:5])
