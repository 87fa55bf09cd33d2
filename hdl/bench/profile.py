"""Where an arm's step goes: the GPU's time by kernel family, and its idle share.

Two traces of a few consecutive steps are taken with torch.profiler. The first records kernels only, which
hardly slows the launching side: idle is the part of its span, from the first kernel's start to the last
one's end, during which no stream was busy; gaps between the same two kernels are added up. The second also
records annotations, with CUDA graphs off, which slows launches but not kernels: there every kernel gets a
family

- from the innermost `record_function` range around its launch whose name is `hdl::FAMILY` (`hdl::lora`,
  `hdl::attention`, ...) or PyTorch's own `Optimizer.step#...`;
- else from its name, by NAMES below.

A fused kernel counts where its main work is: a norm or an activation that also quantizes what it writes
is elementwise. Times are summed over streams, so with kernels side by side families may add up to more
than the busy time.
"""

import json
import re
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from hdl.errors import HdlError

FAMILIES = ("gemm", "attention", "lora", "elementwise", "quantization", "optimizer", "copy")
NAMES = (  # the first that matches, in lower case
    ("attention", r"flash|fmha|sdpa|attention"),
    ("lora", r"lora"),
    ("optimizer", r"adam|multi_tensor_apply|lpnorm|foreach"),
    ("elementwise", r"norm|swiglu|silu|rotary|rope"),
    ("quantization", r"quant|amax"),
    ("gemm", r"gemm|nvjet|cutlass|cublas|splitk|xmma|wgmma|gemv"),
    ("copy", r"^memcpy|^memset"),
)
OURS = "hdl::"
KERNELS = ("kernel", "gpu_memcpy", "gpu_memset")
ANNOTATION = "gpu_user_annotation"
TOP = 15
TOP_GAPS = 6


@dataclass(frozen=True)
class Event:
    """One kernel or copy, or one annotated range as the GPU saw it; times in microseconds."""

    name: str
    start: float
    duration: float
    stream: tuple[Any, ...]
    is_range: bool = False

    @property
    def end(self) -> float:
        return self.start + self.duration


@dataclass(frozen=True)
class Profile:
    """Milliseconds a step. families: by FAMILIES; kernels: (family, name, launches a step, milliseconds);
    gaps: where the GPU was idle, (kernel before, kernel after, times a step, milliseconds)."""

    span: float
    idle: float
    families: dict[str, float]
    kernels: list[tuple[str, str, float, float]]
    gaps: list[tuple[str, str, float, float]]


def summarize(timeline: Sequence[Event], annotated: Sequence[Event], steps: int) -> Profile:
    """Put the two traces together, each of `steps` steps."""
    kernels = [event for event in timeline if not event.is_range]
    span = max(e.end for e in kernels) - min(e.start for e in kernels)
    families = dict.fromkeys(FAMILIES, 0.0)
    by_name: dict[tuple[str, str], list[float]] = defaultdict(list)
    for event, family in classify(annotated):
        families[family] += event.duration / 1e3 / steps
        by_name[family, event.name].append(event.duration / 1e3)
    totals = [(family, name, len(t) / steps, sum(t) / steps) for (family, name), t in by_name.items()]
    return Profile(
        span=span / 1e3 / steps,
        idle=(span - busy(kernels)) / 1e3 / steps,
        families=families,
        kernels=sorted(totals, key=lambda total: -total[3])[:TOP],
        gaps=_longest_gaps(kernels, steps),
    )


def _longest_gaps(kernels: Iterable[Event], steps: int) -> list[tuple[str, str, float, float]]:
    by_place: dict[tuple[str, str], list[float]] = defaultdict(list)
    last: Event | None = None  # to end, of those that began so far
    for event in sorted(kernels, key=lambda e: e.start):
        if last and event.start > last.end:
            by_place[last.name, event.name].append((event.start - last.end) / 1e3)
        if last is None or event.end > last.end:
            last = event
    totals = [(*place, len(t) / steps, sum(t) / steps) for place, t in by_place.items()]
    return sorted(totals, key=lambda total: -total[3])[:TOP_GAPS]


def busy(events: Iterable[Event]) -> float:
    """Microseconds during which at least one of the events ran."""
    total, until = 0.0, float("-inf")
    for event in sorted(events, key=lambda e: e.start):
        total += max(0.0, event.end - max(event.start, until))
        until = max(until, event.end)
    return total


def classify(events: Iterable[Event]) -> list[tuple[Event, str]]:
    """Every kernel with its family."""
    found = []
    around: dict[tuple[Any, ...], list[Event]] = defaultdict(list)  # open ranges by stream, outermost first
    for event in sorted(events, key=lambda e: (e.start, not e.is_range, -e.duration)):
        ranges = around[event.stream]
        while ranges and ranges[-1].end <= event.start:
            ranges.pop()
        if event.is_range:
            if annotated_family(event.name):
                ranges.append(event)
        else:
            inner = annotated_family(ranges[-1].name) if ranges else None
            found.append((event, inner or named_family(event.name)))
    return found


def annotated_family(name: str) -> str | None:
    """The family that a record_function range of this name claims its kernels for, if any."""
    if name.startswith("Optimizer.step#"):
        return "optimizer"
    family = name.removeprefix(OURS)
    return family if name.startswith(OURS) and family in FAMILIES else None


def named_family(kernel: str) -> str:
    for family, pattern in NAMES:
        if re.search(pattern, kernel.lower()):
            return family
    return "elementwise"


def record_kernels(run: Callable[[], None], annotated: bool = False) -> list[Event]:
    """What runs on the GPU during `run`, with the annotations around it if asked for. HdlError when nothing
    can be seen."""
    activities = [ProfilerActivity.CUDA, *([ProfilerActivity.CPU] if annotated else [])]
    torch.cuda.synchronize()
    with profile(activities=activities) as recorded:
        run()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trace.json"
        recorded.export_chrome_trace(str(file))
        raw = json.loads(file.read_text(encoding="utf-8"))
    events = read_events(raw)
    if not any(not event.is_range for event in events):
        raise HdlError(
            "--profile: torch.profiler saw no GPU kernels; the driver may keep performance counters from "
            "ordinary users, or another profiler is attached. Run without --profile"
        )
    return events


def read_events(trace: dict[str, Any]) -> list[Event]:
    """What ran on the GPU in a Chrome trace as torch.profiler writes it."""
    return [
        Event(e["name"], float(e["ts"]), float(e["dur"]), (e["pid"], e["tid"]), e["cat"] == ANNOTATION)
        for e in trace["traceEvents"]
        if e.get("cat") in (*KERNELS, ANNOTATION)
    ]
