"""The fast path, applied to a plain adapted model from outside.

Before DeepSpeed takes the model, `flatten` makes its adapter one flat parameter; afterwards `fuse` packs
the frozen weights and replaces the decoder's forward by one over fused layers. Parameter names and PEFT's
modules stay what they are, now views of packed and flat tensors. The plain path of the same modules is
what the fast one is tested against.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeVar, cast

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from hdl.adapter.flat import FLAT, flat_parameter, flatten_adapter, point_at_flat, trained_parameters
from hdl.errors import ran_out_of_memory
from hdl.kernels.adapter_copies import AdapterCopies
from hdl.kernels.attention import Frame
from hdl.kernels.backend import has_fp8
from hdl.kernels.graphs import Graphs
from hdl.kernels.layer import KEPT, Entrance, FusedLayer, Run, Shared, packs
from hdl.kernels.linears import Fp8Linear, FullLinear, PackedLinear, adapter_order, base_of
from hdl.kernels.restored import (
    Fp8MovingLinear,
    Fp8StoredLinear,
    FullStoredLinear,
    Nf4Linear,
    RestoredLinear,
)
from hdl.kernels.rms_norm import rms_norm, rms_norm_backward
from hdl.kernels.scratch import Scratch
from hdl.kernels.steps import StepGraphs
from hdl.memory.cache import WeightCache
from hdl.memory.host import Alone, Ranks, first_of_machine
from hdl.memory.lockstep import Lockstep
from hdl.memory.offload import Offload, carried
from hdl.memory.shares import ShareStore
from hdl.memory.streaming import HostStore, Store, Streaming, block_bytes, spread
from hdl.o1.config import O1Config
from hdl.o1.decoder import O1, Decoder, DecoderLayer, RMSNorm
from hdl.o1.layout import Layout

T = TypeVar("T")


def flatten(adapted: PeftModel) -> None:
    """Make the decoder's adapter one flat parameter. ValueError when the model `cannot_fuse`."""
    reason = cannot_fuse(adapted)
    if reason:
        raise ValueError(reason)
    linears = [modules for layer in _layers(adapted) for modules in packs(layer)]
    flatten_adapter(adapted, [p for modules in linears for p in adapter_order(modules)])


def fuse(
    adapted: PeftModel,
    *,
    weights: str = "full",
    keep: str | list[str] = "everything",
    stream: int = 0,
    offload: int = 0,
    shard: int = 0,
    ranks: Ranks | None = None,
    cache: WeightCache | None = None,
) -> None:
    """Put a flattened model's decoder on the fast path (flattening it, if that was not done).

    weights: a form of FORMS for the decoder's frozen weights; those that are absent (hdl/memory/absent.py) are
    read and brought into it one by one. keep: a level of `hdl.kernels.layer.KEPT`, or one for each layer.
    stream: layers whose frozen weights stay in host memory (hdl/memory/streaming.py), shared by the `ranks` of a
    machine, who then all fuse together; None: a process alone. offload: layers whose kept things wait there between
    forward and backward (hdl/memory/offload.py). shard: layers whose frozen weights are shared out over the `ranks` of a
    machine (hdl/memory/shares.py), who then take every pass together; not beside stream or offload. cache: of
    this form, from which weights come instead, and where they go if they are not there (hdl/memory/cache.py).
    ValueError when there are not that many layers, keep is none of these, or the model `cannot_fuse`; HdlError when
    the host has not got the memory.
    """
    count = len(_decoder(adapted).layers)
    for name, layers in (("stream", stream), ("offload", offload), ("shard", shard)):
        if not 0 <= layers <= count:
            raise ValueError(f"{name} {layers}: expected 0 to {count}, the number of layers")
    if shard and (stream or offload):
        raise ValueError(
            f"shard {shard} beside stream {stream} and offload {offload}: expected one or the other"
        )
    packed, streamed = _packed(weights, stream or shard, count)
    if cache:
        # A streamed layer is brought in by one rank of a machine, which it is for that rank to write.
        first = first_of_machine(ranks or Alone())
        writes = [first or i in streamed for i in range(count)]
        cache.attach([frozen_linears(layer) for layer in _layers(adapted)], writes)
    fused = fuse_with(adapted, packed, keep)
    if streamed:
        fused.stream(streamed, ranks, ShareStore if shard else HostStore)
    if offload:
        fused.offload_from(carried(offload, count))


def fuse_to_draw(model: O1 | PeftModel, *, weights: str = "full", stream: int = 0) -> None:
    """Put a model's decoder on the fast path for drawing alone (hdl/kernels/steps.py): nothing of it can be trained.

    It may have any number of adapters, which are switched and weighted as before. weights, stream: as `fuse` takes
    them; fp8 keeps no copy for a backward pass. ValueError when there are not that many layers; HdlError when the
    host has not got the memory.
    """
    decoder = _decoder(model)
    count = len(decoder.layers)
    packed, streamed = _packed("fp8_once" if weights == "fp8" else weights, stream, count)
    nothing = nn.Parameter(decoder.norm.weight.new_empty(0), requires_grad=False)
    fused = FusedDecoder(decoder, nothing, packed, ["input"] * count)
    decoder.forward = fused.forward  # type: ignore[method-assign]
    if streamed:
        fused.stream(streamed, None)
    elif nothing.is_cuda:
        fused.step_graphs = StepGraphs()


def _packed(weights: str, stream: int, count: int) -> tuple[list["Packed"], list[int]]:
    """How each of `count` layers is packed, and which of them are streamed."""
    if not 0 <= stream <= count:
        raise ValueError(f"stream {stream}: expected 0 to {count}, the number of layers")
    scratch = Scratch()
    streamed = spread(stream, count) if stream else []
    packed: list[Packed] = [partial(FORMS[weights], scratch=scratch)] * count
    for i in streamed:
        packed[i] = partial(STREAMED[weights], scratch=scratch, resident=False)
    return packed, streamed


# Makes one of modules that share their input.
Packed = Callable[[list[nn.Module]], PackedLinear]

# By model.weights; each is given the modules of a pack, and a scratch that all packs share.
FORMS: dict[str, Callable[..., PackedLinear]] = {
    "full": lambda modules, scratch: FullLinear(modules),
    "fp8": lambda modules, scratch: Fp8Linear(modules),
    "fp8_once": Fp8Linear,
    "fp8_stored": Fp8StoredLinear,
    "nf4": Nf4Linear,
}

# What a streamed layer has in their place.
STREAMED: dict[str, Callable[..., RestoredLinear]] = {
    "full": FullStoredLinear,
    "fp8": Fp8MovingLinear,
    "fp8_once": Fp8MovingLinear,
    "fp8_stored": Fp8StoredLinear,
    "nf4": Nf4Linear,
}


def frozen_linears(layer: DecoderLayer) -> dict[str, nn.Linear]:
    """The frozen linears of a layer, by their names in it."""
    bases = {id(base_of(module)) for modules in packs(layer) for module in modules}
    return {
        name.removesuffix(".base_layer"): cast(nn.Linear, module)
        for name, module in layer.named_modules()
        if id(module) in bases
    }


def streamed_bytes(config: O1Config, weights: str, dtype: torch.dtype) -> int:
    """Host memory that one streamed layer of such a model takes."""
    with torch.device("meta"):
        layer = DecoderLayer(config).to(dtype)
        return block_bytes([STREAMED[weights](p, scratch=Scratch(), resident=False) for p in packs(layer)])


def fuse_with(adapted: PeftModel, packed: Packed | list[Packed], keep: str | list[str]) -> "FusedDecoder":
    """`fuse` with any kind of linears, for all layers or one kind a layer."""
    decoder = _decoder(adapted)
    count = len(decoder.layers)
    levels = [keep] * count if isinstance(keep, str) else list(keep)
    if len(levels) != count or not set(levels) <= set(KEPT):
        raise ValueError(f"keep {keep!r}: expected one of {', '.join(KEPT)}, or a list of {count} of them")
    if flat_parameter(adapted) is None:
        flatten(adapted)
    point_at_flat(adapted)
    flat = cast(nn.Parameter, flat_parameter(adapted))
    kinds = packed if isinstance(packed, list) else [packed] * count
    fused = FusedDecoder(decoder, flat, kinds, levels)
    decoder.forward = fused.forward  # type: ignore[method-assign]
    if list(trained_parameters(adapted)) == [FLAT]:  # else a gradient leaves the decoder at its input, too
        fused.graphs = Graphs(fused)
    # What is said of a gradient is said before anybody else sees it.
    fused.shared.flat.register_hook(lambda _: fused.lockstep.through("backward"))
    return fused


def graphs_of(adapted: PeftModel) -> Graphs | None:
    """What replays the training passes of a fused model, if anything does."""
    fused = fused_decoder(adapted)
    return fused.graphs if fused else None


def fused_decoder(model: O1 | PeftModel) -> "FusedDecoder | None":
    """What stands in for the model's decoder, if it was fused."""
    fused = getattr(_decoder(model).forward, "__self__", None)
    return fused if isinstance(fused, FusedDecoder) else None


def lockstep_of(adapted: PeftModel) -> Lockstep:
    """With which a model's training passes are taken; of a plain model, or one whose ranks are independent, nothing."""
    fused = fused_decoder(adapted)
    return fused.lockstep if fused else Lockstep()


def keep_less(adapted: PeftModel) -> bool:
    """Let every layer of a fused model keep one level less from now on; False if all keep their input alone.

    What CUDA graphs held is given back."""
    fused = fused_decoder(adapted)
    assert fused
    levels = list(KEPT)
    before = [layer.keep for layer in fused.layers]
    for layer in fused.layers:
        layer.keep = levels[min(levels.index(layer.keep) + 1, len(levels) - 1)]
    fused.shared.forget()
    fused.offload.forget()
    if fused.graphs:
        fused.graphs.start_over()
    return [layer.keep for layer in fused.layers] != before


def cannot_fuse(adapted: PeftModel) -> str | None:
    """Why this model can only take the plain path, or None."""
    adapters = 0
    for layer in _layers(adapted):
        for name, module in layer.named_modules():
            if isinstance(module, nn.Linear | LoraLinear) and hasattr(base_of(module).weight, "ds_id"):
                return "the frozen weights are sharded by ZeRO-3"
            if isinstance(module, LoraLinear):
                adapters += 1
                if any(isinstance(d, nn.Dropout) and d.p > 0 for d in module.lora_dropout.values()):
                    return "lora.dropout is not 0"
                if any(module.use_dora.values()):
                    return "lora.dora is on, whose norms need whole weights"
                if list(module.lora_A) != ["default"]:
                    return f"{name} has the adapters {list(module.lora_A)}, expected one named default"
    return None if adapters else "no linear of the decoder has an adapter"


def supports_fp8(device: torch.device) -> bool:
    """Whether e4m3 weights can be multiplied with here; a CPU imitates it."""
    return device.type == "cpu" or has_fp8(device)


class FusedDecoder:
    """The decoder's forward over fused layers."""

    def __init__(
        self,
        decoder: Decoder,
        flat: nn.Parameter,
        packed: list[Packed],
        levels: list[str],
    ) -> None:
        self.config = decoder.config
        self.norm = decoder.norm
        self.shared = Shared(flat)
        self.layers: list[FusedLayer] = []
        self.graphs: Graphs | None = None  # of training passes
        self.step_graphs: StepGraphs | None = None  # of drawing
        self.streaming = Streaming()
        self.lockstep = Lockstep()
        self.offload = Offload()
        self.offloaded: list[int] = []  # layers
        self._last_run: tuple[Layout, Run] | None = None
        start = 0
        for layer, kind, keep in zip(_decoder_layers(decoder), packed, levels):
            below = self.layers[-1] if self.layers else None
            self.layers.append(FusedLayer(layer, self.config, kind, keep, below, self.shared))
            start = self.layers[-1].lay_out_adapter(start)
        linears = [linear for fused in self.layers for linear in fused.linears]
        self.copies = AdapterCopies(linears)

    def stream(self, layers: list[int], ranks: Ranks | None, store: Callable[..., Store] = HostStore) -> None:
        """Bring the weights of these layers, of STREAMED linears, into the store, and fetch them from there."""
        linears = [cast(list[RestoredLinear], self.layers[i].linears) for i in layers]
        self.streaming = Streaming(linears, ranks, store)
        if self.streaming.together:
            self.lockstep = Lockstep(self.streaming, ranks)
        for j, i in enumerate(layers):
            self.layers[i].visit = self.streaming.visits(j)

    def offload_from(self, layers: list[int]) -> None:
        """Let what these layers keep wait in host memory."""
        self.offload, self.offloaded = Offload(len(layers), self.shared.flat.device), layers
        self.offload.outgrown = self._forget_graphs
        for j, i in enumerate(layers):
            self.layers[i].keeper = self.offload.keeper(j)

    def _forget_graphs(self) -> None:
        """A plain pass, of pairs, has taken the host memory from under those that copy there."""
        if self.graphs and self.graphs.captured:
            self.graphs.drop()

    def forward(self, x: Tensor, layout: Layout, deepstack: Sequence[Tensor] = ()) -> Tensor:
        """As Decoder.forward: x [S, D] -> [S, D]."""
        self.copies.refresh()
        seen = layout.seen_index, deepstack
        if self.graphs and not deepstack:  # which no graph has among its inputs
            # Of passes without a gradient, those in training come again and again: a base's predictions.
            graph = self.graphs if torch.is_grad_enabled() else self.graphs.forward_alone
            replayed = graph(x, layout) if torch.is_grad_enabled() or self.norm.training else None
            if replayed is not None:
                return replayed
        self.streaming.prepare("forward")
        return self.with_room(lambda: self.passes(x, self._run_of(layout, x), seen))

    def with_room(self, run: Callable[[], T]) -> T:
        """What `run` returns; where memory runs out, once more without what CUDA graphs hold."""
        try:
            return run()
        except RuntimeError as error:
            # A pass that others take part in cannot be taken again without their knowing (hdl/memory/lockstep.py).
            if self.streaming.together or not ran_out_of_memory(error):
                raise
            dropped = [graphs.drop() for graphs in (self.graphs, self.step_graphs) if graphs]
            if not any(dropped):
                raise
        return run()

    def passes(self, x: Tensor, run: Run, seen: tuple[Tensor, Sequence[Tensor]] | None = None) -> Tensor:
        """All layers, with the adapter's values as they were last brought in. seen: which tokens the visual tower
        made, and what is added to them after each of the first layers."""
        index, deepstack = seen or (None, ())
        with self.offload.passing():
            x = Entrance.apply(x, self.shared.leaf, self.shared)  # type: ignore[no-untyped-call]
            for i, layer in enumerate(self.layers):
                x = layer(x, run)
                if i < len(deepstack):
                    x = x.index_add(0, index, deepstack[i].to(x.dtype))  # type: ignore[arg-type]
        return FinalNorm.apply(x, self.norm)  # type: ignore[no-any-return,no-untyped-call]

    def _run_of(self, layout: Layout, x: Tensor) -> Run:
        """Made once for a layout that comes several times in a row, as when sampling."""
        if self._last_run is None or self._last_run[0] is not layout:
            self._last_run = (layout, Run.of(Frame.of(layout, exact=True), layout, self.config, x))
        return self._last_run[1]


class FinalNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, norm: RMSNorm) -> Tensor:  # type: ignore[no-untyped-def]
        normed, rstd = rms_norm(x, norm.weight, norm.eps)
        ctx.save_for_backward(x, rstd, norm.weight)
        return normed

    @staticmethod
    def backward(ctx, dnormed: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        x, rstd, weight = ctx.saved_tensors
        return rms_norm_backward(dnormed, x, rstd, weight), None


def _decoder(model: O1 | PeftModel) -> Decoder:
    above = "base_model.model." if isinstance(model, PeftModel) else ""
    return cast(Decoder, model.get_submodule(f"{above}model.language_model"))


def _layers(adapted: PeftModel) -> Iterator[DecoderLayer]:
    return _decoder_layers(_decoder(adapted))


def _decoder_layers(decoder: Decoder) -> Iterator[DecoderLayer]:
    return (cast(DecoderLayer, layer) for layer in decoder.layers)
