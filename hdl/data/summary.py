"""What a run of prepare did, as it tells it: the last words on the terminal, report.txt and report.json."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from hdl.data.images import Skip
from hdl.data.samples import SampleInfo
from hdl.data.shards import write_durably
from hdl.errors import HdlError
from hdl.o1.patches import PATCH


@dataclass
class Summary:
    """Counts are of samples unless said otherwise. Paths in `skips` and `notes` are relative to `images`."""

    images: Path
    out: Path
    shards: int = 0
    reused: int = 0
    new: int = 0
    removed: int = 0  # images
    taken: int = 0  # images
    pairs: int = 0  # images with references
    mirrored: int = 0  # images that may be trained mirrored
    captions: Counter[int] = field(default_factory=Counter)  # captions an image -> images
    views: Counter[str | None] = field(default_factory=Counter)  # view -> samples
    buckets: dict[tuple[int, int], int] = field(default_factory=dict)
    skips: dict[str, Skip] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)

    def count(self, infos: list[SampleInfo]) -> None:
        """One image's samples."""
        first = infos[0]
        self.taken += 1
        self.pairs += bool(first.references)
        self.mirrored += first.mirrored
        self.captions[len(first.captions)] += 1
        for info in infos:
            self.views[info.view] += 1
        if first.note:
            self.notes[first.source] = first.note

    def skips_by_kind(self) -> dict[str, int]:
        return dict(Counter(skip.kind for skip in self.skips.values()).most_common())


def nothing_usable(summary: Summary) -> HdlError:
    """Writes the report and returns the error that counts the reasons."""
    write_report(summary)
    counts = ", ".join(f"{count} × {kind}" for kind, count in summary.skips_by_kind().items())
    file, skip = min(summary.skips.items())
    return HdlError(
        f"{summary.images}: no usable image with a caption ({counts}); for example {file}: {skip.reason}. "
        f"All of them are listed in {summary.out / 'report.txt'}"
    )


def write_report(summary: Summary) -> None:
    """report.json for programs and report.txt for people, in the output folder."""
    record = {
        "samples": summary.new + summary.reused,
        "reused": summary.reused,
        "new": summary.new,
        "removed": summary.removed,
        "images": summary.taken,
        "pairs": summary.pairs,
        "mirrored_share": round(summary.mirrored / max(1, summary.taken), 4),
        "captions_an_image": {str(count): images for count, images in sorted(summary.captions.items())},
        "views": {view: samples for view, samples in summary.views.items() if view is not None},
        "counts": summary.skips_by_kind(),
        "skipped": [
            {"file": f, "kind": s.kind, "reason": s.reason} for f, s in sorted(summary.skips.items())
        ],
        "notes": [{"file": f, "note": note} for f, note in sorted(summary.notes.items())],
    }
    write_durably(summary.out / "report.json", json.dumps(record, indent=1).encode())
    lines = [describe(summary), ""]
    lines += [f"skipped {file}: {skip.reason}" for file, skip in sorted(summary.skips.items())]
    lines += [f"note    {file}: {note}" for file, note in sorted(summary.notes.items())]
    write_durably(summary.out / "report.txt", ("\n".join(lines) + "\n").encode(errors="surrogateescape"))


def describe(summary: Summary) -> str:
    """The last words of a run: what was taken, the buckets, what was skipped, where things are."""
    lines = [
        f"{summary.new + summary.reused} samples in {summary.shards} shard(s): "
        f"reused {summary.reused}, new {summary.new}, removed {summary.removed}"
    ]
    if summary.taken:
        captions = ", ".join(f"{n} with {count}" for count, n in sorted(summary.captions.items()))
        lines.append(
            f"{summary.taken} images: captions {captions}; {summary.pairs} pairs for editing; "
            f"{summary.mirrored / summary.taken:.0%} may be mirrored"
        )
    if views := [f"{samples} × {view}" for view, samples in summary.views.items() if view is not None]:
        lines.append(f"views: {', '.join(views)}")
    if summary.buckets:
        lines.append("  width x height   patches   samples")
    for (rows, cols), count in summary.buckets.items():
        lines.append(f"  {cols * PATCH:5} x {rows * PATCH:<6} {rows * cols:9} {count:9}")
    for kind, count in summary.skips_by_kind().items():
        lines.append(f"skipped {count} × {kind}")
    if summary.shards:
        lines.append(f"shards: {summary.out}   report: {summary.out / 'report.txt'}")
    return "\n".join(lines)
