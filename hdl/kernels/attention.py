"""O1's attention over a packed run in two calls, forward and backward, whatever lengths are in it.

AR tokens attend causally among themselves, GEN tokens attend to everything in their own segment (see
hdl.o1.layout). Both are cuDNN's variable-length attention: every segment is a sequence that starts at
some row of the run and has some length, so no mask is built, nothing is padded or gathered, and queries,
keys, values, outputs and gradients are read and written where they stand, as column slices of wider
buffers too. A plan is compiled for the longest sequence rounded up, so streams of ever new sizes soon
meet only plans they know. Starts and lengths are numbers in device memory: launches depend on a layout's
`Frame` alone, and a captured launch serves every layout that fits its frame.

cuDNN is called through its own front end (the `cudnn` package, Hopper and newer, bfloat16); elsewhere
the same two calls are PyTorch's scaled_dot_product_attention, as in hdl.o1.attention.

Shapes: q [S, heads, d], k and v [S, kv_heads, d], contiguous in the last two dimensions; d is the head
size, scores are scaled by 1/sqrt(d).
"""

import importlib.util
import math
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import accumulate
from typing import Any, NamedTuple, Protocol

import torch
import triton
import triton.language as tl
from torch import Tensor

from hdl.o1.attention import packed_attention
from hdl.o1.layout import Layout, Segment
from hdl.transfer import send

ROUND_TO = 128  # the kernels' own tile: a longer plan than needed costs empty tiles only
# Of frames. Rows cost in proportion, so a frame's tokens are rounded up by a 64th to a 32nd at most, and it
# serves runs that leave up to MAX_WASTE empty. Bounds of sequences cost next to nothing.
STEPS = 32
MAX_WASTE = 0.04
ROUND_TEXT_TO, ROUND_GEN_TO, ROUND_WHOLE_TO = 256, 256, 512


@dataclass(frozen=True)
class Frame:
    """The sizes that the launches of a run depend on.

    tokens: rows of all buffers. With `tail` the last of them belong to no sample (one at least); they are a
    sequence of their own, so that what stands there stays finite, and of zeros when its gradients are zeros.
    text, gen, whole: upper bounds of a sample's AR tokens, its GEN tokens and both.
    segments: what exactly is in the run, where the attention's kernels depend on all of it; else None.
    """

    tokens: int
    samples: int
    tail: bool
    text: int
    gen: int
    whole: int
    segments: tuple[Segment, ...] | None

    @classmethod
    def of(cls, layout: Layout, exact: bool) -> "Frame":
        """exact: of this very layout, with no room to spare."""
        segments = layout.segments
        text = max(segment.text - 1 for segment in segments)
        gen = max(segment.tokens - segment.text + 1 for segment in segments)
        whole = max(segment.tokens for segment in segments)
        if exact:
            return cls(layout.tokens, len(segments), False, text, gen, whole, segments)
        tokens = rows_for(layout.tokens)
        room = math.ceil(tokens * MAX_WASTE)  # what a smaller run may leave to the tail
        gen, whole = max(gen, room), max(whole, room)
        bounds = up(text, ROUND_TEXT_TO), up(gen, ROUND_GEN_TO), up(whole, ROUND_WHOLE_TO)
        return cls(tokens, len(segments), tokens > layout.tokens, *bounds, None)

    def serves(self, layout: Layout) -> bool:
        """Whether a run of this layout fits, without wasting more than MAX_WASTE of its rows."""
        if self.segments is not None:
            return self.segments == layout.segments
        needed = Frame.of(layout, exact=True)
        if self.tail:
            fits = layout.tokens < self.tokens <= layout.tokens * (1 + MAX_WASTE)
        else:
            fits = layout.tokens == self.tokens
        longest = needed.text <= self.text and needed.gen <= self.gen and needed.whole <= self.whole
        return fits and longest and needed.samples == self.samples


def rows_for(tokens: int) -> int:
    """Rows of the buffers of a run that is captured: up to a 32nd more than its tokens."""
    return up(tokens, max(2 ** (tokens.bit_length() - 1) // STEPS, 1))


class Gradients(NamedTuple):
    """Of q, k and v, each shaped like it and contiguous."""

    q: Tensor
    k: Tensor
    v: Tensor


class RunAttention(Protocol):
    """Attention of one packed run; made once for a run, used by all layers."""

    def load(self, layout: Layout) -> None:
        """Let the next calls be of another layout that fits the frame."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Any:
        """Fill out [S, heads * d]; returns what backward needs besides the arguments."""

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: Any
    ) -> Gradients: ...


def run_attention(frame: Frame, layout: Layout, device: torch.device, dtype: torch.dtype) -> RunAttention:
    """The fastest attention there is for this device and dtype."""
    if needs_exact_frame(device, dtype):
        return SdpaAttention(layout)
    attention = CudnnAttention(frame, device)
    attention.load(layout)
    return attention


def needs_exact_frame(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether attention here takes the layout it was made for alone: it is not cuDNN's."""
    return not (device.type == "cuda" and dtype == torch.bfloat16 and _has_cudnn_front_end(device.index or 0))


class SdpaAttention:
    """PyTorch's own attention, with its own backward."""

    def __init__(self, layout: Layout) -> None:
        self.layout = layout

    def load(self, layout: Layout) -> None:
        assert layout.segments == self.layout.segments  # the same index tensors serve

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> None:
        out.copy_(packed_attention(q, k, v, self.layout).flatten(-2))

    def backward(self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: None) -> Gradients:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        with torch.enable_grad():
            again = packed_attention(leaves[0], leaves[1], leaves[2], self.layout)
        gradients = torch.autograd.grad(again, leaves, dout.unflatten(-1, q.shape[1:]))
        return Gradients(*(gradient.contiguous() for gradient in gradients))


@dataclass(frozen=True)
class Sequences:
    """One of the two calls: which rows of the run ask, and which answer, segment by segment."""

    causal: bool
    longest_query: int
    longest_key: int
    query_lengths: Tensor  # int32 [B, 1, 1, 1], as cuDNN wants it
    key_lengths: Tensor
    query_starts: Tensor  # int64 [B + 1, 1, 1, 1], in rows of the run
    key_starts: Tensor

    @property
    def count(self) -> int:
        return len(self.query_lengths)


class CudnnCalls:
    """cuDNN's attention over sequences that stand in the rows of packed runs."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._offsets: dict[tuple[int, int, int], Tensor] = {}
        # `_plan` remembers only so many, and a graph that replays these calls never asks it for them again.
        self._plans: dict[PlanShape, Plan] = {}

    def attend(self, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> Tensor:
        """Fill out's rows of these sequences; returns the statistics that backward needs."""
        plan = self._planned(self._shape(sequences, q, k, v, out))
        stats = torch.empty(plan.shape.stats, device=self.device, dtype=torch.float32)
        plan.run_forward(
            q=q, k=k, v=v, o=out, stats=stats, **self._rows(sequences, q=q, k=k, v=v, o=out)
        )  # fmt: skip
        return stats

    def attend_backward(
        self, sequences: Sequences, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor,
        stats: Tensor, dq: Tensor, dk: Tensor, dv: Tensor,
    ) -> None:  # fmt: skip
        """Fill dq's, dk's and dv's rows."""
        shape = self._shape(sequences, q, k, v, out, dout)
        self._planned(shape).run_backward(
            q=q, k=k, v=v, o=out, do=dout, stats=stats, dq=dq, dk=dk, dv=dv,
            **self._rows(sequences, q=q, k=k, v=v, o=out, do=dout, dq=dq, dk=dk, dv=dv),
        )  # fmt: skip

    def _planned(self, shape: "PlanShape") -> "Plan":
        if shape not in self._plans:
            self._plans[shape] = _plan(shape, self.device)
        return self._plans[shape]

    def _shape(
        self, sequences: Sequences, q: Tensor, k: Tensor, v: Tensor, out: Tensor, dout: Tensor | None = None
    ) -> "PlanShape":
        longest_query, longest_key = (
            up(n, ROUND_TO) for n in (sequences.longest_query, sequences.longest_key)
        )
        return PlanShape(
            sequences.causal, sequences.count, q.shape[1], k.shape[1], q.shape[2], longest_query, longest_key,
            q.stride(0), k.stride(0), v.stride(0), out.stride(0), out.stride(0) if dout is None else dout.stride(0),
            torch.are_deterministic_algorithms_enabled(),
        )  # fmt: skip

    def _rows(self, sequences: Sequences, **tensors: Tensor) -> dict[str, Tensor]:
        """Where each segment starts in each tensor, counted in elements as cuDNN does."""
        rows = {"query_lengths": sequences.query_lengths, "key_lengths": sequences.key_lengths}
        for name, tensor in tensors.items():
            asks = name.removeprefix("d") in ("q", "o")
            starts = sequences.query_starts if asks else sequences.key_starts
            key = (starts.data_ptr(), len(starts), tensor.stride(0))
            if key not in self._offsets:
                self._offsets[key] = starts * tensor.stride(0)
            rows[f"{name}_starts"] = self._offsets[key]
        return rows


class CudnnAttention(CudnnCalls):
    """The two calls through cuDNN. To be loaded before use."""

    def __init__(self, frame: Frame, device: torch.device) -> None:
        super().__init__(device)
        self.frame = frame
        samples = frame.samples
        sequences = samples + frame.tail
        # All numbers in one piece of memory, so that one copy brings them.
        self._numbers = torch.empty(2 * (sequences + 1) + 3 * sequences, dtype=torch.int64, device=device)
        starts, lengths = self._numbers.split([2 * (sequences + 1), 3 * sequences])
        at, at_gen = starts.view(2, -1, 1, 1, 1).unbind()
        # int32 in the memory of as many int64: cuDNN wants them so
        text, gen, whole = lengths.view(torch.int32)[: 3 * sequences].view(3, -1, 1, 1, 1).unbind()
        self.gen = Sequences(False, frame.gen, frame.whole, gen, whole, at_gen, at)
        self.ar = Sequences(
            True, frame.text, frame.text, text[:samples], text[:samples], at[: samples + 1], at[: samples + 1]
        )

    def load(self, layout: Layout) -> None:
        text = [segment.text - 1 for segment in layout.segments]
        whole = [segment.tokens for segment in layout.segments]
        if self.frame.tail:
            text, whole = [*text, 0], [*whole, self.frame.tokens - layout.tokens]
        at = list(accumulate(whole, initial=0))
        at_gen = [start + n for start, n in zip(at, text)] + at[-1:]
        gen = [tokens - n for tokens, n in zip(whole, text)]
        numbers = torch.zeros(len(self._numbers), dtype=torch.int64)
        numbers[: 2 * len(at)] = torch.tensor(at + at_gen)
        numbers[2 * len(at) :].view(torch.int32)[: 3 * len(gen)] = torch.tensor(text + gen + whole)
        self._numbers.copy_(send(numbers, self.device))

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
        return self.attend(self.gen, q, k, v, out), self.attend(self.ar, q, k, v, out)

    def backward(
        self, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, saved: tuple[Tensor, Tensor]
    ) -> Gradients:
        dq = torch.empty_like(q)
        dk, dv = torch.empty_like(k), torch.empty_like(k)
        self.attend_backward(self.gen, dout, q, k, v, out, saved[0], dq, dk, dv)
        # Text keys answer both to text and to the image: the two gradients add up.
        text_dk, text_dv = torch.empty_like(k), torch.empty_like(k)
        self.attend_backward(self.ar, dout, q, k, v, out, saved[1], dq, text_dk, text_dv)
        self.add_text(dk.flatten(1), dv.flatten(1), text_dk.flatten(1), text_dv.flatten(1))
        return Gradients(dq, dk, dv)

    def add_text(self, dk: Tensor, dv: Tensor, text_dk: Tensor, text_dv: Tensor) -> None:
        """dk += text_dk, dv += text_dv in the rows of AR tokens; all [S, width], contiguous."""
        width = dk.shape[1]
        _add_text[(self.ar.count, self.frame.text)](
            dk, dv, text_dk, text_dv, self.ar.query_starts, self.ar.query_lengths,
            width, triton.next_power_of_2(width), num_warps=4,
        )  # fmt: skip


@triton.jit
def _add_text(
    dk: tl.tensor,
    dv: tl.tensor,
    text_dk: tl.tensor,
    text_dv: tl.tensor,
    starts: tl.tensor,
    lengths: tl.tensor,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
) -> None:
    """A program takes one token of one sample."""
    sample, token = tl.program_id(0), tl.program_id(1)
    if token < tl.load(lengths + sample):
        columns = tl.arange(0, BLOCK)
        inside = columns < WIDTH
        at = (tl.load(starts + sample) + token) * WIDTH + columns
        _add_at(dk, text_dk, at, inside)
        _add_at(dv, text_dv, at, inside)


@triton.jit
def _add_at(whole: tl.tensor, part: tl.tensor, at: tl.tensor, inside: tl.tensor) -> None:
    total = tl.load(whole + at, mask=inside).to(tl.float32) + tl.load(part + at, mask=inside)
    tl.store(whole + at, total.to(whole.dtype.element_ty), mask=inside)


class PlanShape(NamedTuple):
    """All that a cuDNN plan depends on; the strides are elements from one token to the next.

    deterministic: whether backward adds up in one order, as torch.use_deterministic_algorithms asks; else queries'
    gradients come out in the order in which blocks of keys happen to be done."""

    causal: bool
    batch: int
    heads: int
    kv_heads: int
    head_dim: int
    longest_query: int
    longest_key: int
    q_stride: int
    k_stride: int
    v_stride: int
    out_stride: int
    dout_stride: int
    deterministic: bool = False

    @property
    def stats(self) -> tuple[int, int, int, int]:
        return (self.batch, self.heads, self.longest_query, 1)


class Plan:
    """The compiled forward and backward of one shape; each is compiled when first run."""

    def __init__(self, shape: PlanShape, device: torch.device) -> None:
        self.shape = shape
        self.device = device
        self._forward: _Graph | None = None
        self._backward: _Graph | None = None

    def run_forward(self, **tensors: Tensor) -> None:
        if self._forward is None:
            self._forward = self._build_forward()
        self._forward.run(tensors)

    def run_backward(self, **tensors: Tensor) -> None:
        if self._backward is None:
            self._backward = self._build_backward()
        self._backward.run(tensors)

    def _build_forward(self) -> "_Graph":
        s = self.shape
        graph = _Graph(self.device)
        q, k, v = self._inputs(graph)
        o, stats = graph.graph.sdpa(q=q, k=k, v=v, generate_stats=True, **self._settings(graph))
        graph.output(o, "o", s.batch, s.heads, s.longest_query, s.head_dim, s.out_stride)
        graph.plain_output(stats, "stats", s.stats)
        return graph.build()

    def _build_backward(self) -> "_Graph":
        s = self.shape
        graph = _Graph(self.device)
        q, k, v = self._inputs(graph)
        o = graph.sequence("o", s.batch, s.heads, s.longest_query, s.head_dim, s.out_stride)
        do = graph.sequence("do", s.batch, s.heads, s.longest_query, s.head_dim, s.dout_stride)
        stats = graph.plain("stats", s.stats)
        dq, dk, dv = graph.graph.sdpa_backward(
            q=q, k=k, v=v, o=o, dO=do, stats=stats,
            use_deterministic_algorithm=s.deterministic, **self._settings(graph),
        )  # fmt: skip
        q_row, k_row = s.heads * s.head_dim, s.kv_heads * s.head_dim
        graph.output(dq, "dq", s.batch, s.heads, s.longest_query, s.head_dim, q_row)
        graph.output(dk, "dk", s.batch, s.kv_heads, s.longest_key, s.head_dim, k_row)
        graph.output(dv, "dv", s.batch, s.kv_heads, s.longest_key, s.head_dim, k_row)
        return graph.build()

    def _inputs(self, graph: "_Graph") -> tuple[Any, Any, Any]:
        s = self.shape
        return (
            graph.sequence("q", s.batch, s.heads, s.longest_query, s.head_dim, s.q_stride),
            graph.sequence("k", s.batch, s.kv_heads, s.longest_key, s.head_dim, s.k_stride),
            graph.sequence("v", s.batch, s.kv_heads, s.longest_key, s.head_dim, s.v_stride),
        )

    def _settings(self, graph: "_Graph") -> dict[str, Any]:
        settings = {
            "attn_scale": self.shape.head_dim**-0.5,
            "use_padding_mask": True,
            "seq_len_q": graph.lengths("query_lengths", self.shape.batch),
            "seq_len_kv": graph.lengths("key_lengths", self.shape.batch),
        }
        return settings | ({"use_causal_mask": True} if self.shape.causal else {})


class _Graph:
    """A cuDNN graph under construction, then compiled; tensors are known by name."""

    def __init__(self, device: torch.device) -> None:
        import cudnn

        self.cudnn = cudnn
        self.device = device
        self.handle = _handle(device)
        self.graph = cudnn.pygraph(
            io_data_type=cudnn.data_type.BFLOAT16,
            intermediate_data_type=cudnn.data_type.FLOAT,
            compute_data_type=cudnn.data_type.FLOAT,
            handle=self.handle,
        )
        self.names: dict[str, Any] = {}

    def sequence(self, name: str, batch: int, heads: int, longest: int, dim: int, row: int) -> Any:
        """Sequences of up to `longest` tokens in [.., heads, dim], `row` elements from token to token."""
        tensor = self.graph.tensor(
            name=name,
            dim=(batch, heads, longest, dim),
            stride=(longest * row, dim, row, 1),
            data_type=self.cudnn.data_type.BFLOAT16,
        )
        tensor.set_ragged_offset(self._starts(name, batch))
        self.names[name] = tensor
        return tensor

    def lengths(self, name: str, batch: int) -> Any:
        self.names[name] = self._integers(name, batch, self.cudnn.data_type.INT32)
        return self.names[name]

    def plain(self, name: str, dim: tuple[int, ...]) -> Any:
        _, h, s, _ = dim
        self.names[name] = self.graph.tensor(
            name=name, dim=dim, stride=(h * s, s, 1, 1), data_type=self.cudnn.data_type.FLOAT
        )
        return self.names[name]

    def output(
        self, tensor: Any, name: str, batch: int, heads: int, longest: int, dim: int, row: int
    ) -> None:
        tensor.set_output(True).set_dim((batch, heads, longest, dim)).set_stride((longest * row, dim, row, 1))
        tensor.set_ragged_offset(self._starts(name, batch))
        self.names[name] = tensor

    def plain_output(self, tensor: Any, name: str, dim: tuple[int, ...]) -> None:
        _, h, s, _ = dim
        tensor.set_output(True).set_data_type(self.cudnn.data_type.FLOAT)
        tensor.set_dim(dim).set_stride((h * s, s, 1, 1))
        self.names[name] = tensor

    def build(self) -> "_Graph":
        modes = [self.cudnn.heur_mode.A, self.cudnn.heur_mode.FALLBACK]
        self.graph.validate()
        self.graph.build_operation_graph()
        self.graph.create_execution_plans(modes)
        self.graph.check_support()
        self.graph.build_plans()
        self.workspace_bytes = max(1, self.graph.get_workspace_size())
        return self

    def run(self, tensors: dict[str, Tensor]) -> None:
        stream = torch.cuda.current_stream(self.device).cuda_stream
        self.cudnn.set_stream(handle=self.handle, stream=stream)
        workspace = torch.empty(self.workspace_bytes, device=self.device, dtype=torch.uint8)
        pack = {self.names[name]: tensor for name, tensor in tensors.items()}
        self.graph.execute(pack, workspace, handle=self.handle)

    def _starts(self, name: str, batch: int) -> Any:
        starts = f"{name}_starts"
        self.names[starts] = self._integers(starts, batch + 1, self.cudnn.data_type.INT64)
        return self.names[starts]

    def _integers(self, name: str, count: int, kind: Any) -> Any:
        return self.graph.tensor(name=name, dim=(count, 1, 1, 1), stride=(1, 1, 1, 1), data_type=kind)


@lru_cache(maxsize=256)
def _plan(shape: PlanShape, device: torch.device) -> Plan:
    return Plan(shape, device)


@cache
def _handle(device: torch.device) -> Any:
    import cudnn

    with torch.cuda.device(device):
        return cudnn.create_handle()


@cache
def _has_cudnn_front_end(index: int) -> bool:
    return importlib.util.find_spec("cudnn") is not None and torch.cuda.get_device_capability(index) >= (9, 0)


def up(n: int, step: int) -> int:
    """n, rounded up to a multiple of step."""
    return -(-n // step) * step
