"""What became of a folder's captions: counts, lengths, and the phrases that too many of them share."""

import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

from hdl.caption.settings import Settings

WRITTEN, REWORDED, KEPT = "written", "reworded", "kept"
MEANINGS = {  # in the order of the summary; the rules' and records' own words among them
    WRITTEN: "written",
    REWORDED: "written anew from the model's earlier answer, by the rules of now",
    KEPT: "kept: of the same image, model and settings",
    "by hand": "written or edited by hand, left alone (--overwrite replaces them)",
    "empty": "without a caption: the model answered with nothing",
    "refused": "without a caption: the model refused",
    "too long": "without a caption: the model's answer is longer than any caption may be",
    "server error": "without a caption: the server failed",
    "unreadable": "images that cannot be read",
}
NAMED = ("by hand", "empty", "refused", "too long", "server error", "unreadable")
PHRASE_WORDS = (4, 5, 6)
MAX_PHRASES, MAX_NAMED = 12, 8


@dataclass(frozen=True)
class Outcome:
    """What became of one caption, or of an image that cannot be read. cut: its answer was cut off."""

    source: str
    name: str
    kind: str
    reason: str = ""
    cut: bool = False


@dataclass(frozen=True)
class Phrase:
    """A run of words that `count` captions hold, `starts` of them at their start."""

    words: str
    count: int
    starts: int


@dataclass(frozen=True)
class Summary:
    images: int
    outcomes: list[Outcome]
    captions: list[str]
    """All captions that are in the folder now, whoever wrote them."""
    phrases: list[Phrase]
    sheet: Path
    by_kind: dict[str, list[Outcome]] = field(default_factory=dict)


def summarize(
    images: int, outcomes: list[Outcome], captions: list[str], sheet: Path, settings: Settings
) -> Summary:
    by_kind: dict[str, list[Outcome]] = {kind: [] for kind in MEANINGS}
    for outcome in sorted(outcomes, key=lambda outcome: outcome.name):
        by_kind[outcome.kind].append(outcome)
    ours = [settings.trigger, *settings.style_descriptors.values(), *settings.tag_descriptors.values()]
    phrases = repeated(captions, [words for words in ours if words])
    return Summary(images, outcomes, captions, phrases, sheet, by_kind)


def repeated(captions: list[str], ours: list[str]) -> list[Phrase]:
    """Runs of 4 to 6 words that at least a twentieth of the captions (and three) hold, most frequent first.

    ours: phrases put there on purpose, which are taken out first. A run that shares three words on end with one
    already told is not told.
    """
    holding: Counter[str] = Counter()
    starting: Counter[str] = Counter()
    for caption in captions:
        for phrase in ours:
            caption = re.sub(rf"(?<!\w){re.escape(phrase)}(?!\w)", " ", caption, flags=re.IGNORECASE)
        words = re.findall(r"\w+(?:['’-]\w+)*", caption.lower())
        starting.update({" ".join(words[:n]) for n in PHRASE_WORDS if len(words) >= n})
        holding.update({" ".join(words[i : i + n]) for n in PHRASE_WORDS for i in range(len(words) - n + 1)})
    least = max(3, len(captions) / 20)
    found: list[Phrase] = []
    told: set[tuple[str, ...]] = set()
    for run, count in sorted(holding.items(), key=lambda item: (-item[1], -len(item[0].split()), item[0])):
        if count < least or len(found) == MAX_PHRASES:
            break
        words = run.split()
        parts = {tuple(words[i : i + 3]) for i in range(len(words) - 2)}
        if told.isdisjoint(parts):
            found.append(Phrase(run, count, starting[run]))
            told |= parts
    return found


def describe(summary: Summary) -> list[str]:
    """The last words of a run, a line each; the sheet begins with the same."""
    lines = [f"{summary.images} images, {len(summary.captions)} captions"]
    for kind, outcomes in summary.by_kind.items():
        if outcomes:
            lines.append(f"  {len(outcomes):6} {MEANINGS[kind]}")
    cut = sum(outcome.cut for outcome in summary.outcomes)
    if cut:
        lines.append(f"  {cut:6} answers ended at max_new_tokens; raise it if captions end too early")
    if summary.captions:
        words = sorted(len(caption.split()) for caption in summary.captions)
        lines.append(f"words a caption: {words[0]} min, {median(words):g} median, {words[-1]} max")
    if summary.phrases:
        lines.append("phrases that many captions share (a replace rule or another prompt thins them out):")
    for phrase in summary.phrases:
        share = phrase.count / len(summary.captions)
        starts = f", {phrase.starts} start with it" if phrase.starts else ""
        lines.append(f"  {share:6.0%} {phrase.words!r} ({phrase.count} captions{starts})")
    for kind in NAMED:
        outcomes = summary.by_kind[kind]
        for outcome in outcomes[:MAX_NAMED]:
            lines.append(f"{kind}: {outcome.name}" + (f": {outcome.reason}" if outcome.reason else ""))
        if len(outcomes) > MAX_NAMED:
            lines.append(f"{kind}: and {len(outcomes) - MAX_NAMED} more, marked in the sheet")
    return lines
