"""What the settings of hdl/bench/cards.py took, beside what was predicted, as Markdown and as plain data."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hdl.bench.card_run import Figures
from hdl.bench.cards import Row, Setting
from hdl.memory.offload import moved
from hdl.memory.plan import GIB, Gpu
from hdl.o1.config import O1Config

NOTES = """\
GiB: peak of PyTorch's reserved memory (torch.cuda.max_memory_reserved), loading included; + what the driver keeps
beside it, which no allocator sees. reference: the same form of weights, all resident and everything kept, on the whole
GPU. host: the process's own memory while loading, above what it kept afterwards. max(work, copies): of a step that
streams, the step of the same linears where they are, or the time that its copies take by themselves."""
HEAD = (
    "row", "plan", "predicted GiB", "GiB", "error", "bound", "ms", "reference ms", "ratio", "wanted", "predicted ms",
    "loading s", "host GiB",
)  # fmt: skip


@dataclass(frozen=True)
class Taken:
    """A setting and its figures; reference, standing: of what it is compared to (hdl/bench/cards.py)."""

    setting: Setting
    figures: Figures
    reference: Figures | None = None
    standing: Figures | None = None

    def predicted(self, config: O1Config, gpu: Gpu) -> dict[str, float]:
        needed = self.setting.need(config)
        return vars(needed) | {"peak": needed.peak, "ms": self.setting.ms(config, gpu)}

    def error(self, config: O1Config) -> float | None:
        """Of the predicted peak, as a share of the measured one."""
        if not self.figures.reserved or self.figures.failed:
            return None
        return self.setting.need(config).peak / self.figures.reserved - 1

    @property
    def ratio(self) -> float | None:
        return _over(self.figures.step, self.reference.step if self.reference else None)

    def copies(self) -> float | None:
        """Seconds that a step's streamed weights take by themselves."""
        rate = self.figures.rates.get("weights in")
        return 2 * max(self.setting.stream - 2, 0) * self.figures.block / rate if rate else None

    @property
    def over_streaming(self) -> float | None:
        """The step over the longer of its work and its copies."""
        work, copies = self.standing.step if self.standing else None, self.copies()
        return _over(self.figures.step, max(work, copies)) if work and copies is not None else None


def _over(a: float | None, b: float | None) -> float | None:
    return a / b if a and b else None


def as_markdown(rows: Mapping[Row, Taken], config: O1Config, gpu: Gpu) -> str:
    lines = [f"| {' | '.join(HEAD)} |", "|" + "---|" * len(HEAD)]
    streams = []
    for row, taken in rows.items():
        lines.append(_row(row, taken, config, gpu))
        work, copies = taken.standing.step if taken.standing else None, taken.copies()
        if taken.over_streaming and work and copies is not None:
            rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in taken.figures.rates.items())
            streams.append(
                f"{row.name}: streaming takes {taken.figures.step * 1e3:.1f} ms, "  # type: ignore[operator]
                f"{taken.over_streaming:.2f} x max(work {work * 1e3:.1f}, copies {copies * 1e3:.1f}); "
                f"{offloaded(taken.setting)}GB/s: {rates}"
            )
    return "\n".join([*lines, "", *streams, *([""] if streams else []), NOTES])


def offloaded(setting: Setting) -> str:
    return f"{moved(setting.offload)} layers' things travel beside; " if setting.offload else ""


def _row(row: Row, taken: Taken, config: O1Config, gpu: Gpu) -> str:
    setting, figures = taken.setting, taken.figures
    predicted = taken.predicted(config, gpu)
    context = f" + {figures.context / GIB:.1f}" if figures.context is not None else ""
    cells = [
        row.name,
        (figures.failed and f"{setting.words()}: OUT OF MEMORY, {figures.failed}") or setting.words(),
        f"{predicted['peak'] / GIB:.2f}",
        f"{figures.reserved / GIB:.2f}{context}" if figures.reserved else "-",
        _percent(taken.error(config)),
        f"{row.bound:g}",
        _ms(figures.step),
        _ms(taken.reference.step if taken.reference else None),
        f"{taken.ratio:.2f}" if taken.ratio else "-",
        f"{row.ratio:.2f}",
        f"{predicted['ms']:.0f}",
        f"{figures.loading:.1f}",
        f"{(figures.host_peak - figures.host_kept) / GIB:.2f}",
    ]
    return f"| {' | '.join(cells)} |"


def random_as_markdown(taken: Sequence[Taken], config: O1Config, gpu: Gpu, within: float = 0.08) -> str:
    lines = ["| setting | predicted GiB | GiB | error | predicted ms | ms |", "|---|---|---|---|---|---|"]
    for one in taken:
        predicted, figures = one.predicted(config, gpu), one.figures
        measured = f"{figures.reserved / GIB:.2f}" if figures.reserved else "-"
        lines.append(
            f"| {one.setting.words()}{' OUT OF MEMORY' if figures.failed else ''} | {predicted['peak'] / GIB:.2f} | "
            f"{measured} | {_percent(one.error(config))} | {predicted['ms']:.0f} | {_ms(figures.step)} |"
        )
    errors = [error for one in taken if (error := one.error(config)) is not None]
    if errors:
        inside = sum(abs(error) <= within for error in errors)
        worst = max(errors, key=abs)
        lines += ["", f"{inside} of {len(taken)} within {within:.0%}, the worst {_percent(worst)}"]
    return "\n".join(lines)


def as_data(taken: Taken, config: O1Config, gpu: Gpu) -> dict[str, Any]:
    return {
        "setting": taken.setting.as_data(),
        "words": taken.setting.words(),
        "predicted": taken.predicted(config, gpu),
        "measured": taken.figures.as_data(),
        "error": taken.error(config),
        "reference": taken.reference.as_data() if taken.reference else None,
        "standing": taken.standing.as_data() if taken.standing else None,
        "ratio": taken.ratio,
        "over_streaming": taken.over_streaming,
    }


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{share:+.1%}"


def _ms(seconds: float | None) -> str:
    return "-" if seconds is None else f"{seconds * 1e3:.1f}"
