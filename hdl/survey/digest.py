"""What the curation report says of a folder: lists and counts, in the order in which they are shown.

All that decides what is worth looking at is here; hdl/survey/page.py only prints it.
"""

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from hdl.data.images import Skip
from hdl.survey.survey import Survey

BLURRED = (
    2.0  # px at hdl.survey.survey.SIDE: four at a size of 1024. Photographs that look sharp are below 1.6
)
FEW_IN_BUCKET = 4  # samples
SHORT_CAPTION = 10  # tokens
GROUPS, IN_GROUP, STRIP, BUCKETS, IN_BUCKET = 30, 6, 12, 24, 3  # with pictures, at most


@dataclass(frozen=True)
class Entry:
    """One sample of the shards: the image it is of, its bucket in patches, its captions as trained and their
    tokens (of the caption alone, without the prompt's frame). An image may have several samples."""

    source: str
    rows: int
    cols: int
    captions: Sequence[str]
    tokens: Sequence[int]
    style: str | None = None
    tags: Sequence[str] = ()


@dataclass
class Digest:
    """What the page says: lists in the order in which they are shown. Sources are images, not samples."""

    seen: Survey
    area: int
    samples: int
    buckets: dict[tuple[int, int], list[str]]  # (rows, cols) -> sources, the fullest first
    captions: dict[tuple[str, str], int]  # (source, caption) -> tokens, the shortest first
    styles: dict[str, int]  # -> images, the most first
    tags: dict[str, int]
    unstyled: int  # images without a style
    untagged: int
    skips: dict[str, Skip]
    notes: dict[str, str]
    identical: list[list[str]] = field(default_factory=list)
    near: list[list[str]] = field(default_factory=list)
    softest: list[str] = field(default_factory=list)  # all images with an edge, the most blurred first
    blurred: list[str] = field(default_factory=list)
    edgeless: list[str] = field(default_factory=list)
    small: list[str] = field(default_factory=list)  # below the area, the smallest first
    sparse: list[tuple[int, int]] = field(default_factory=list)
    short: list[tuple[str, str]] = field(default_factory=list)
    shared: dict[str, list[str]] = field(default_factory=dict)  # caption -> its two or more sources

    @classmethod
    def of(
        cls,
        seen: Survey,
        entries: Sequence[Entry],
        skips: dict[str, Skip],
        notes: dict[str, str],
        area: int,
    ) -> "Digest":
        buckets: dict[tuple[int, int], list[str]] = defaultdict(list)
        captions: dict[tuple[str, str], int] = {}
        of_caption: dict[str, list[str]] = defaultdict(list)
        looks: dict[str, Entry] = {}
        for entry in entries:
            looks.setdefault(entry.source, entry)
            buckets[entry.rows, entry.cols].append(entry.source)
            for caption, tokens in zip(entry.captions, entry.tokens):
                if (entry.source, caption) not in captions:
                    of_caption[caption].append(entry.source)
                captions[entry.source, caption] = tokens
        styles = Counter(look.style for look in looks.values() if look.style)
        tags = Counter(tag for look in looks.values() for tag in dict.fromkeys(look.tags))
        digest = cls(
            seen=seen,
            area=area,
            samples=len(entries),
            buckets=dict(sorted(buckets.items(), key=lambda item: (-len(item[1]), item[0]))),
            captions=dict(sorted(captions.items(), key=lambda item: item[1])),
            styles=dict(styles.most_common()),
            tags=dict(tags.most_common()),
            unstyled=sum(not look.style for look in looks.values()),
            untagged=sum(not look.tags for look in looks.values()),
            skips=dict(sorted((skips | seen.skips).items())),
            notes=dict(sorted(notes.items())),
        )
        facts = seen.facts
        for group in seen.alike:
            group = sorted(group, key=lambda s: -facts[s].width * facts[s].height)
            (digest.identical if seen.identical(group) else digest.near).append(group)
        blurs = {source: fact.blur for source, fact in facts.items() if fact.blur is not None}
        digest.softest = sorted(blurs, key=lambda source: -blurs[source])
        digest.blurred = [source for source in digest.softest if blurs[source] > BLURRED]
        digest.edgeless = [source for source in facts if source not in blurs]
        sizes = {source: fact.width * fact.height for source, fact in facts.items()}
        digest.small = sorted((s for s in sizes if sizes[s] < area * area), key=lambda s: sizes[s])
        digest.sparse = [grid for grid, sources in digest.buckets.items() if len(sources) < FEW_IN_BUCKET]
        digest.short = [key for key, tokens in digest.captions.items() if tokens < SHORT_CAPTION]
        shared = {caption: sources for caption, sources in of_caption.items() if len(sources) > 1}
        digest.shared = dict(sorted(shared.items(), key=lambda item: -len(item[1])))
        return digest

    def shown(self) -> list[str]:
        """The sources whose thumbnails the page has."""
        groups = [group[:IN_GROUP] for group in (self.identical[:GROUPS] + self.near[:GROUPS])]
        in_buckets = [sources[:IN_BUCKET] for sources in list(self.buckets.values())[:BUCKETS]]
        strips = [self.softest[:STRIP], self.edgeless[:STRIP], self.small[:STRIP]]
        return list(dict.fromkeys(source for part in (*groups, *in_buckets, *strips) for source in part))
