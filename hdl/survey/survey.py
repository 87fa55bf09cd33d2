"""What the images of a folder look like, without looking at them: sizes, sharpness, and which are alike.

Each file is decoded once, in worker processes and no larger than needed (a JPEG's decoder can leave out most
of the work), and leaves a few numbers behind; pictures for the page are made at the end, of the few that it
shows. So memory grows by some 700 bytes an image.

Two pictures are near-duplicates when their perceptual hashes differ in at most HASH_DISTANCE of 64 bits *and*
their 8x8 miniatures correlate. The hash finds candidates without comparing each with each; alone it would be
wrong about a handful in every 100,000 pictures, and blind to colour.

Workers import this file: nothing heavier than Pillow and numpy here.
"""

import hashlib
import io
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from hdl.data.images import (
    Skip,
    decoding,
    open_image,
    read_bytes,
    shrink_on_decoding,
    upright_rgb,
    upright_size,
)
from hdl.data.workers import in_order

SIDE = 512  # px, the longer side at which pictures are looked at; smaller ones stay as they are
TILE = 32  # px; sharpness is judged tile by tile, for the background may be soft
LEAST_CONTRAST = 1.0  # grey levels a pixel, of 255; a tile with a smaller slope has nothing to judge
SHARPEST = 10  # per cent of the tiles that decide
OWN_BLUR = 1.0  # px, Gaussian deviation of `smooth`
HASH_SIDE, HASH_BITS, HASH_DISTANCE = 32, 64, 10
MINI, MINI_CORRELATION = 8, 0.9
FLAT = 2.0  # levels of 255: a miniature that varies less is one flat colour, and like nothing
ROWS_A_BLOCK, PAIRS_A_BLOCK = 64, 4096


@dataclass(frozen=True, slots=True)
class Facts:
    """What is known of one image.

    width, height: px, upright. blur: deviation in px of the Gaussian that the picture's sharpest parts seem
    to be blurred with, seen at SIDE px; None where nothing has an edge. mini: uint8 RGB [MINI*MINI*3].
    """

    width: int
    height: int
    format: str
    sha256: str
    hash: int
    blur: float | None
    mini: bytes


@dataclass
class Survey:
    """facts and skips by source (path relative to the folder, in its order). alike: groups of two or more
    sources that show the same picture, the largest group first; identical files are among them."""

    facts: dict[str, Facts] = field(default_factory=dict)
    skips: dict[str, Skip] = field(default_factory=dict)
    alike: list[list[str]] = field(default_factory=list)

    def identical(self, group: list[str]) -> bool:
        """Whether a group is one file several times over."""
        return len({self.facts[source].sha256 for source in group}) == 1


def survey(root: Path, sources: Iterable[str], workers: int = 0) -> Survey:
    """Look at the images `sources` (relative to `root`) in `workers` processes (0: in this one).

    A file that cannot be read or shown becomes a skip, as in hdl.data.images; nothing else is raised.
    """
    found = Survey()
    jobs = ((source, str(root / source)) for source in sources)
    for source, seen in tqdm(in_order(look_at, jobs, workers), desc="surveying", unit="image", disable=None):
        if isinstance(seen, Skip):
            found.skips[source] = seen
        else:
            found.facts[source] = seen
    facts = list(found.facts.values())
    hashes = np.array([fact.hash for fact in facts], np.uint64)
    minis = np.frombuffer(b"".join(fact.mini for fact in facts), np.uint8).reshape(
        len(facts), MINI * MINI * 3
    )
    names = list(found.facts)
    found.alike = [[names[i] for i in group] for group in alike(hashes, minis)]
    return found


def thumbnails(root: Path, sources: Iterable[str], side: int, workers: int = 0) -> dict[str, bytes]:
    """Source -> WebP of at most side x side px. Files that cannot be shown (any more) are left out."""
    jobs = ((source, str(root / source)) for source in dict.fromkeys(sources))
    made = in_order(partial(thumbnail, side=side), jobs, workers)
    return {source: data for source, data in made if data}


def thumbnail(path: str, side: int) -> bytes | None:
    """`thumbnails` for one file."""
    try:
        image = reduced(read_bytes(path)).image
    except Skip:
        return None
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=65, method=4)
    return file.getvalue()


def look_at(path: str) -> Facts | Skip:
    """One file's facts; a Skip is returned, not raised, for another process."""
    try:
        data = read_bytes(path)
        seen = reduced(data)
    except Skip as skip:
        return skip
    grey = seen.image.convert("L")
    return Facts(
        width=seen.width,
        height=seen.height,
        format=seen.format,
        sha256=hashlib.sha256(data).hexdigest(),
        hash=perceptual_hash(grey),
        blur=blur(np.asarray(grey, np.float32)),
        mini=seen.image.resize((MINI, MINI), Image.Resampling.BOX).tobytes(),
    )


# --- decoding


@dataclass(frozen=True)
class Reduced:
    """An upright RGB picture of at most SIDE px, and what it was."""

    image: Image.Image
    width: int
    height: int
    format: str


def reduced(data: bytes) -> Reduced:
    """An image file's bytes, decoded no larger than needed. Raises Skip."""
    with decoding():
        image = open_image(data)
        (width, height), format = upright_size(image), image.format or ""
        shrink_on_decoding(image, SIDE / max(image.size))
        # Indices, transparency and 16 bits are only right when converted first.
        if image.mode in ("RGB", "L") and "transparency" not in image.info:
            image.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        picture = upright_rgb(image)
        picture.thumbnail((SIDE, SIDE), Image.Resampling.BOX)
        return Reduced(picture, width, height, format)


# --- sharpness


def blur(grey: np.ndarray) -> float | None:
    """How blurred a picture is. grey: float32 [H, W], 0..255. Deviation in px of a Gaussian, or None.

    Where a line is blurred by a Gaussian of deviation s, mean slope² / mean Laplacian² = 2 s² / 3: for a bump
    g, the integrals of g'² and g''² are 1 and 3 / (2 s²) times 1 / (4 √π s³). (For an edge it is 2 s²; but the
    sharpest parts of nearly all pictures are lines and texture.) Contrast cancels, unlike in the plain
    variance of the Laplacian, which calls every drawing with large even areas blurred.
    The picture is smoothed first, or the noise of 8 bits would pass for sharpness where there is none.
    """
    if min(grey.shape) < 8:  # a strip: nothing is left once its borders are gone
        return None
    soft = smooth(grey)
    across, down = soft[1:-1, 2:] - soft[1:-1, :-2], soft[2:, 1:-1] - soft[:-2, 1:-1]
    centre = soft[1:-1, 1:-1]
    laplacian = soft[1:-1, 2:] + soft[1:-1, :-2] + soft[2:, 1:-1] + soft[:-2, 1:-1] - 4 * centre
    slope = tile_means((across * across + down * down) / 4)
    curvature = tile_means(laplacian * laplacian)
    judged = slope > LEAST_CONTRAST**2
    if not judged.any():
        return None
    variance = 1.5 * slope[judged] / curvature[judged] - OWN_BLUR**2
    return float(np.sqrt(max(0.0, np.percentile(variance, SHARPEST))))


def smooth(grey: np.ndarray) -> np.ndarray:
    """[H, W] -> [H - 4, W - 4]: the binomial filter 1 4 6 4 1 both ways, of variance 1."""
    for _ in range(2):
        grey = (grey[:-2] + 2 * grey[1:-1] + grey[2:]) / 4
        grey = (grey[:, :-2] + 2 * grey[:, 1:-1] + grey[:, 2:]) / 4
    return grey


def tile_means(values: np.ndarray) -> np.ndarray:
    """[H, W] -> the mean of each whole tile, flat; a side shorter than a tile is one."""
    height, width = values.shape
    high, wide = min(TILE, height), min(TILE, width)
    down, across = height // high, width // wide
    return values[: down * high, : across * wide].reshape(down, high, across, wide).mean((1, 3)).ravel()


# --- pictures that are alike


def cosines() -> np.ndarray:
    """The DCT-II matrix [HASH_SIDE, HASH_SIDE], not normalised."""
    k = np.arange(HASH_SIDE)
    return np.cos(np.pi / HASH_SIDE * np.outer(k, k + 0.5))


def lowest() -> tuple[list[int], list[int]]:
    """(down, across) of the HASH_BITS lowest frequencies, from low to high; the mean is none."""
    all_of_them = [(down, across) for down in range(HASH_SIDE) for across in range(HASH_SIDE)]
    chosen = sorted(all_of_them, key=lambda at: (sum(at), at))[1 : HASH_BITS + 1]
    return [down for down, _ in chosen], [across for _, across in chosen]


COSINES, LOWEST = cosines(), lowest()


def perceptual_hash(grey: Image.Image) -> int:
    """64 bits that say which of a picture's lowest frequencies are stronger than their median.

    pHash (Zauner 2010, Implementation and Benchmarking of Perceptual Image Hash Functions), with the 64
    lowest frequencies in place of an 8x8 block of them: those change less when a picture is cropped.
    """
    small = np.asarray(grey.resize((HASH_SIDE, HASH_SIDE), Image.Resampling.BOX), np.float64)
    values = (COSINES @ small @ COSINES.T)[LOWEST].round(6)  # else an even picture's bits are rounding errors
    return int.from_bytes(np.packbits(values > np.median(values)).tobytes(), "big")


def alike(hashes: np.ndarray, minis: np.ndarray) -> list[list[int]]:
    """Groups of two or more indices of near-duplicates, each in order, the largest group first.

    hashes: uint64 [n]; minis: uint8 [n, MINI*MINI*3]. A chain of pairs makes one group.
    """
    same: dict[tuple[int, bytes], list[int]] = defaultdict(list)
    for i, key in enumerate(zip(hashes.tolist(), map(bytes, minis))):
        same[key].append(i)
    firsts = np.array([members[0] for members in same.values()], np.int64)
    groups = Groups(len(firsts))
    minis = minis[firsts]
    for left, right in near_pairs(hashes[firsts], HASH_DISTANCE):
        groups.join_where_alike(left, right, minis)
    members: dict[int, list[int]] = defaultdict(list)
    for i, those in enumerate(same.values()):
        members[groups.find(i)] += those
    found = [sorted(group) for group in members.values() if len(group) > 1]
    return sorted(found, key=lambda group: (-len(group), group))


def near_pairs(hashes: np.ndarray, distance: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Blocks of all pairs (left < right) of hashes uint64 [n] that differ in at most `distance` bits.

    Two such hashes agree wholly in one of distance + 1 bands of bits (there are more bands than differences),
    so only those with an equal band are compared. A pair may come several times.
    """
    bounds = np.linspace(0, HASH_BITS, distance + 2).astype(int)
    for low, high in pairwise(bounds):
        band = (hashes >> np.uint64(low)) & np.uint64((1 << int(high - low)) - 1)
        order = np.argsort(band, kind="stable")
        starts = np.flatnonzero(np.diff(band[order])) + 1
        for members in np.split(order, starts):
            sorted_hashes = hashes[members]
            for start in range(0, len(members) - 1, ROWS_A_BLOCK):
                rows = sorted_hashes[start : start + ROWS_A_BLOCK, None]
                near = np.bitwise_count(rows ^ sorted_hashes[None, start:]) <= distance
                left, right = np.nonzero(near)
                later = left < right
                if later.any():
                    yield members[start + left[later]], members[start + right[later]]


class Groups:
    """Union-find over 0 .. n - 1."""

    def __init__(self, n: int) -> None:
        self.parent = list(range(n))
        self.label = np.arange(n)  # the group of each when it was last asked for: to drop known pairs fast

    def find(self, i: int) -> int:
        while self.parent[i] != i:
            self.parent[i] = self.parent[self.parent[i]]
            i = self.parent[i]
        return i

    def join_where_alike(self, left: np.ndarray, right: np.ndarray, minis: np.ndarray) -> None:
        """Join those of the pairs whose miniatures are alike."""
        for start in range(0, len(left), PAIRS_A_BLOCK):
            a, b = left[start : start + PAIRS_A_BLOCK], right[start : start + PAIRS_A_BLOCK]
            apart = self.label[a] != self.label[b]
            a, b = a[apart], b[apart]
            close = correlation(minis[a], minis[b]) >= MINI_CORRELATION
            for i, j in zip(a[close].tolist(), b[close].tolist()):
                self.parent[self.find(j)] = self.find(i)
            touched = np.unique(np.concatenate([a[close], b[close]]))
            self.label[touched] = [self.find(i) for i in touched.tolist()]


def correlation(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Of uint8 [n, k] with [n, k], row by row: [n] in -1 .. 1, so brightness and contrast do not count."""
    a, b = (rows - rows.mean(1, keepdims=True) for rows in (a.astype(np.float32), b.astype(np.float32)))
    spread_a, spread_b = (np.sqrt((rows * rows).mean(1)) for rows in (a, b))
    both = (spread_a > FLAT) & (spread_b > FLAT)
    return np.where(both, (a * b).mean(1) / np.where(both, spread_a * spread_b, 1), 0)
