"""Duplicates are found, other photographs are not; blur is told from softness that is meant."""

import io
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import skimage
from PIL import Image, ImageDraw, ImageEnhance, ImageFilter, ImageOps

from hdl.data.images import Skip
from hdl.survey.digest import BLURRED
from hdl.survey.survey import HASH_DISTANCE, Survey, alike, look_at, near_pairs, survey, thumbnails
from tests.data.image_folders import noise

SHELF = Path(skimage.__file__).parent / "data"
PHOTOGRAPHS = [
    "astronaut.png",
    "coffee.png",
    "chelsea.png",
    "rocket.jpg",
    "camera.png",
    "motorcycle_left.png",
]
OTHERS = [
    "hubble_deep_field.jpg",
    "retina.jpg",
    "moon.png",
    "coins.png",
    "ihc.png",
    "grass.png",
    "gravel.png",
]


def photograph(name: str) -> Image.Image:
    return Image.open(SHELF / name).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    x, y = round(image.width * share / 2), round(image.height * share / 2)
    return image.crop((x, y, image.width - x, image.height - y))


VARIANTS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "same.png": lambda image: image,
    "q60.jpg": lambda image: image,
    "half.webp": lambda image: image.resize((image.width // 2, image.height // 2)),
    "huge.jpg": lambda image: image.resize(
        (2400, 2400 * image.height // image.width)
    ),  # decoded at a quarter
    "crop.png": lambda image: cropped(image, 0.03),
    "bright.jpg": lambda image: ImageEnhance.Brightness(image).enhance(1.1),
    "dark.png": lambda image: ImageEnhance.Brightness(image).enhance(0.9),
}


@pytest.fixture(scope="module")
def zoo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Photographs with their variants in a folder each, their mirror images, and other photographs."""
    root = tmp_path_factory.mktemp("zoo")
    for name in PHOTOGRAPHS:
        image, folder = photograph(name), root / name
        folder.mkdir()
        for variant, make in VARIANTS.items():
            make(image).save(folder / variant, quality=60, compress_level=1)
        ImageOps.mirror(image).save(root / f"mirrored-{name}", quality=95, compress_level=1)
    for name in OTHERS:
        (root / name).write_bytes((SHELF / name).read_bytes())
    return root


def names_below(root: Path) -> list[str]:
    return sorted(path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def seen(zoo: Path) -> Survey:
    return survey(zoo, names_below(zoo))


# --- duplicates


def test_variants_of_a_photograph_are_found_and_nothing_else_is(seen: Survey) -> None:
    expected = [sorted(f"{name}/{variant}" for variant in VARIANTS) for name in PHOTOGRAPHS]
    assert sorted(seen.alike) == sorted(expected)
    assert not seen.skips


def test_the_distance_lies_between_variants_and_other_photographs(seen: Survey) -> None:
    """At half the distance some crops are lost; other pictures keep half as much again away."""

    def distance(a: str, b: str) -> int:
        return (seen.facts[a].hash ^ seen.facts[b].hash).bit_count()

    own = [distance(f"{name}/same.png", f"{name}/{variant}") for name in PHOTOGRAPHS for variant in VARIANTS]
    kinds = (
        [f"{name}/same.png" for name in PHOTOGRAPHS] + [f"mirrored-{name}" for name in PHOTOGRAPHS] + OTHERS
    )
    other = [distance(a, b) for i, a in enumerate(kinds) for b in kinds[:i]]
    assert HASH_DISTANCE / 2 < max(own) <= HASH_DISTANCE
    assert min(other) >= HASH_DISTANCE * 1.5


def test_the_same_drawing_in_other_colours_is_another_picture(tmp_path: Path) -> None:
    red, green, blue = photograph("coffee.png").split()
    Image.merge("RGB", (red, green, blue)).save(tmp_path / "a.png")
    Image.merge("RGB", (blue, red, green)).save(tmp_path / "b.png")
    assert not survey(tmp_path, ["a.png", "b.png"]).alike


def test_identical_files_are_told_from_near_duplicates(zoo: Path, tmp_path: Path) -> None:
    source = zoo / "coffee.png"
    for name, variant in (("a.png", "same.png"), ("b/a.png", "same.png"), ("c.jpg", "q60.jpg")):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes((source / variant).read_bytes())
    two, three = survey(tmp_path, ["a.png", "b/a.png"]), survey(tmp_path, ["a.png", "b/a.png", "c.jpg"])
    assert two.alike == [["a.png", "b/a.png"]] and two.identical(two.alike[0])
    assert three.alike == [["a.png", "b/a.png", "c.jpg"]] and not three.identical(three.alike[0])


def test_blank_pictures_of_different_colours_are_not_alike(tmp_path: Path) -> None:
    for i, colour in enumerate(["white", "black", "red", "white"]):
        Image.new("RGB", (64 + i, 64), colour).save(tmp_path / f"{i}.png")
    assert survey(tmp_path, [f"{i}.png" for i in range(3)]).alike == []


@pytest.mark.parametrize("distance", [0, 1, 5, 10, 14])
def test_near_pairs_are_all_pairs_within_the_distance(distance: int) -> None:
    rng = np.random.default_rng(distance)
    hashes = rng.integers(0, 2**64, 600, dtype=np.uint64)
    for i in range(300, 600):  # the second half: those of the first with up to 20 bits changed
        bits = rng.choice(64, rng.integers(0, 21), replace=False).astype(np.uint64)
        hashes[i] = hashes[i - 300] ^ np.bitwise_xor.reduce(np.uint64(1) << bits, initial=np.uint64(0))
    near = np.bitwise_count(hashes[:, None] ^ hashes[None]) <= distance
    expected = {(i, j) for i, j in np.argwhere(near).tolist() if i < j}
    found = [(i, j) for left, right in near_pairs(hashes, distance) for i, j in zip(left, right)]
    assert {(int(min(pair)), int(max(pair))) for pair in found} == expected


def test_groups_in_thirty_thousand_images_are_found_and_chains_join() -> None:
    rng = np.random.default_rng(0)
    hashes = rng.integers(0, 2**64, 30_000, dtype=np.uint64)
    minis = rng.integers(0, 256, (30_000, 192), dtype=np.uint8)
    for i, other in ((20_000, 7), (29_999, 20_000)):  # each 8 bits from the one before: the ends are 16 apart
        hashes[i] = hashes[other] ^ (np.uint64(0xFF) << np.uint64(i % 56))
        minis[i] = minis[other]
    hashes[123] = hashes[4567]  # by accident: their miniatures differ
    assert alike(hashes, minis) == [[7, 20_000, 29_999]]


def test_a_thousand_frames_of_one_film_are_one_group() -> None:
    rng = np.random.default_rng(0)
    hashes = np.full(1000, 0x0123456789ABCDEF, np.uint64) ^ (
        np.uint64(1) << rng.integers(0, 64, 1000, np.uint64)
    )
    minis = np.tile(rng.integers(0, 200, 192, dtype=np.uint8), (1000, 1)) + rng.integers(
        0, 9, (1000, 1), np.uint8
    )
    assert alike(hashes, minis) == [list(range(1000))]


# --- sharpness


def encoded_blur(image: Image.Image, path: Path) -> float | None:
    image.save(path, compress_level=1)
    facts = look_at(str(path))
    assert not isinstance(facts, Skip)
    return facts.blur


@pytest.mark.parametrize("width", [200, 500, 1200])
@pytest.mark.parametrize("name", ["coffee.png", "chelsea.png", "rocket.jpg"])
def test_a_blurred_photograph_ranks_behind_itself_at_any_size(name: str, width: int, tmp_path: Path) -> None:
    whole = photograph(name)
    image = whole.resize((width, width * whole.height // whole.width), Image.Resampling.LANCZOS)
    values = [
        encoded_blur(image.filter(ImageFilter.GaussianBlur(width * share)), tmp_path / "a.png")
        for share in (0, 0.004, 0.008, 0.012)
    ]
    assert None not in values
    assert values == sorted(values) and len(set(values)) == 4  # type: ignore[type-var]


@pytest.mark.parametrize("name", [*PHOTOGRAPHS, *OTHERS])
def test_photographs_look_sharp_and_blurred_ones_do_not(name: str, tmp_path: Path) -> None:
    image = photograph(name)
    sharp = encoded_blur(image, tmp_path / "a.png")
    blurred = encoded_blur(
        image.filter(ImageFilter.GaussianBlur(max(image.size) * 0.008)), tmp_path / "a.png"
    )
    assert sharp is not None and sharp < 0.8 * BLURRED
    assert blurred is not None and blurred > 1.2 * BLURRED


def test_a_smooth_drawing_with_sharp_lines_does_not_look_blurred(tmp_path: Path) -> None:
    shade = np.linspace(120, 220, 1200)[:, None, None] * np.ones((1, 1200, 3))
    image = Image.fromarray(shade.astype(np.uint8))
    pen = ImageDraw.Draw(image)
    pen.ellipse((300, 300, 900, 900), fill=(240, 180, 160), outline=(20, 20, 20), width=6)
    pen.line((100, 1100, 1100, 100), fill=(0, 0, 0), width=4)
    blur = encoded_blur(image, tmp_path / "a.png")
    assert blur is not None and blur < BLURRED / 2


def test_a_soft_background_does_not_make_a_picture_look_blurred(tmp_path: Path) -> None:
    image = photograph("coffee.png").resize((1200, 800))
    sharp = image.resize((1200, 800)).crop((400, 250, 800, 550))
    soft = image.filter(ImageFilter.GaussianBlur(16))
    everywhere = encoded_blur(soft, tmp_path / "a.png")
    soft.paste(photograph("chelsea.png").resize(sharp.size), (400, 250))
    subject = encoded_blur(soft, tmp_path / "a.png")
    assert everywhere is not None and subject is not None and subject < BLURRED < everywhere


def test_an_enlarged_small_picture_looks_blurred(tmp_path: Path) -> None:
    small = photograph("coffee.png").resize((96, 64), Image.Resampling.LANCZOS)
    blur = encoded_blur(small.resize((1536, 1024), Image.Resampling.BICUBIC), tmp_path / "a.png")
    assert blur is not None and blur > BLURRED


@pytest.mark.parametrize("size", [(300, 200), (32, 4000)])
def test_where_there_is_no_edge_there_is_no_verdict(size: tuple[int, int], tmp_path: Path) -> None:
    assert encoded_blur(Image.new("RGB", size, "white"), tmp_path / "a.png") is None


# --- files


def test_facts_are_those_of_the_upright_picture(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter
    noise(1600, 1200).save(tmp_path / "a.jpg", exif=exif)
    facts = survey(tmp_path, ["a.jpg"]).facts["a.jpg"]
    assert (facts.width, facts.height, facts.format) == (1200, 1600, "JPEG")
    with Image.open(io.BytesIO(thumbnails(tmp_path, ["a.jpg"], 100)["a.jpg"])) as thumb:
        assert thumb.size == (75, 100) and thumb.format == "WEBP"


def test_bad_files_are_skips_and_do_not_stop(tmp_path: Path) -> None:
    noise(64, 64).save(tmp_path / "good.png")
    noise(20, 64).save(tmp_path / "small.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:500])
    (tmp_path / "text.jpg").write_bytes(b"no image at all")
    names = ["cut.png", "gone.png", "good.png", "small.png", "text.jpg"]
    here, elsewhere = survey(tmp_path, names), survey(tmp_path, names, workers=1)
    assert list(here.facts) == ["good.png"] and here.facts == elsewhere.facts
    for found in (here, elsewhere):
        assert {source: skip.kind for source, skip in found.skips.items()} == {
            "cut.png": "corrupt image",
            "gone.png": "unreadable file",
            "small.png": "too small",
            "text.jpg": "corrupt image",
        }
    assert list(thumbnails(tmp_path, names, 32)) == ["good.png"]


def test_no_image_at_all(tmp_path: Path) -> None:
    assert survey(tmp_path, []) == Survey()


def test_workers_start_without_torch() -> None:
    script = "import sys, hdl.survey.survey; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0
