"""tools/prepare.py as a person meets it: good folders, bad folders, reruns, interruptions."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import skimage
import torch
from PIL import Image
from safetensors.torch import load_file

import hdl.data.pictures
import hdl.data.prepare
from hdl.data.captions import CaptionOptions
from hdl.data.index import VERSION
from hdl.data.output import claimed
from hdl.data.prepare import Options, Summary, prepare
from hdl.data.samples import info_to_json
from hdl.data.shards import Shards
from hdl.errors import HdlError
from hdl.o1.checkpoint import open_checkpoint
from hdl.o1.prompt import PromptEncoder
from tests.data.image_folders import BASE, noise, put

ROOT = Path(__file__).parents[2]
SMALL_SHARDS = 60_000  # bytes; a 64x64 sample takes some 20 kB
Run = Callable[..., Summary]


def files(folder: Path) -> dict[str, bytes]:
    """Everything in a prepared folder but the report, which tells how it came about."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith("report.")}


def sources(out: Path) -> list[str]:
    return [info.source for info in Shards(out).infos]


def counts(summary: Summary) -> tuple[int, int, int]:
    return summary.reused, summary.new, summary.removed


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that were decoded, not merely read."""
    names = []
    original = hdl.data.pictures.upright_rgb

    def spy(image):  # type: ignore[no-untyped-def]
        names.append(current[0])
        return original(image)

    current = [""]
    make = hdl.data.prepare.pictures_or_skip

    def named(job):  # type: ignore[no-untyped-def]
        current[0] = Path(job.path).name
        return make(job)

    monkeypatch.setattr(hdl.data.pictures, "upright_rgb", spy)
    monkeypatch.setattr(hdl.data.prepare, "pictures_or_skip", named)
    return names


@pytest.fixture
def twelve(images: Path) -> Path:
    for i in range(12):
        put(images, f"{i:02}.png", f"thing {i}", noise(64, 64, seed=i))
    return images


# --- what is taken


def test_images_in_any_depth_in_a_fixed_order(images: Path, run: Run) -> None:
    for name in ("b.png", "a/z.jpg", "a/b/c.webp", "A.PNG", "with.dots and spaces.png", "ünï.png"):
        put(images, name)
    assert sources(run().out) == sorted(
        ("A.PNG", "a/b/c.webp", "a/z.jpg", "b.png", "with.dots and spaces.png", "ünï.png")
    )


def test_hidden_files_and_links_leading_out_are_left_alone(images: Path, run: Run, tmp_path: Path) -> None:
    put(images, "a.png")
    put(images, ".hidden.png")
    put(images, ".git/b.png")
    outside = put(tmp_path / "outside", "c.png")
    (images / "link.png").symlink_to(outside)
    (images / "linked").symlink_to(outside.parent)
    (images / "again.png").symlink_to(images / "a.png")
    (images / "again.txt").write_text("the same once more")
    summary = run()
    assert sources(summary.out) == ["a.png", "again.png"]
    assert {file: skip.kind for file, skip in summary.skips.items()} == {
        "link.png": "link leading out",
        "linked": "link leading out",
    }


def test_file_names_that_are_not_utf_8(images: Path, run: Run) -> None:
    put(images, os.fsdecode(b"b\xe4r.png"), "a bear")
    put(images, os.fsdecode(b"l\xf6we.png"), caption=None)
    summary = run()
    assert [info.captions[0] for info in Shards(summary.out).infos] == ["a bear"]
    assert b"skipped l\xf6we.png: there is no caption" in (summary.out / "report.txt").read_bytes()


def test_output_inside_the_images_folder_is_not_taken_for_input(images: Path, run: Run) -> None:
    put(images, "a.png")
    for _ in range(2):
        assert run(out=images / "shards").skips == {}


def test_every_bad_file_is_skipped_counted_and_named(images: Path, run: Run) -> None:
    put(images, "good.png", "a good one")
    put(images, "uncaptioned.png", caption=None)
    put(images, "latin.png").with_suffix(".txt").write_bytes("Bär".encode("latin-1"))
    put(images, "silent.png", caption=" \n")
    put(images, "tiny.png", image=noise(64, 31))
    put(images, "zero.png").write_bytes(b"")
    put(images, "garbage.jpg").write_bytes(b"no image at all")
    cut = put(images, "cut.png", image=noise(64, 64))
    cut.write_bytes(cut.read_bytes()[:-3000])
    put(images, "endless.png", caption="word " * 5000)
    put(images, "special.png", caption="a <|tms_token|> b")
    (images / "orphan.txt").write_text("no image")
    (images / "notes.pdf").write_text("no image")
    summary = run()
    assert sources(summary.out) == ["good.png"]
    expected = {
        "uncaptioned.png": "no caption",
        "latin.png": "caption not UTF-8",
        "silent.png": "empty caption",
        "tiny.png": "too small",
        "zero.png": "empty file",
        "garbage.jpg": "corrupt image",
        "cut.png": "corrupt image",
        "endless.png": "caption not usable",
        "special.png": "caption not usable",
        "orphan.txt": "caption without image",
        "notes.pdf": "not an image",
    }
    assert {file: skip.kind for file, skip in summary.skips.items()} == expected
    report = json.loads((summary.out / "report.json").read_text())
    assert {skip["file"]: skip["kind"] for skip in report["skipped"]} == expected
    assert report["counts"]["corrupt image"] == 2
    text = (summary.out / "report.txt").read_text()
    for file, skip in summary.skips.items():
        assert f"skipped {file}: {skip.reason}" in text


def test_animation_is_noted_also_when_reused(images: Path, run: Run) -> None:
    path = put(images, "a.gif")
    frames = [Image.new("RGB", (64, 64), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:])
    for _ in range(2):
        assert run().notes == {"a.gif": "the file has 2 frames; the first one is used"}


def test_photographs(images: Path, run: Run) -> None:
    shelf = Path(skimage.__file__).parent / "data"
    sizes = {"astronaut.png": (8, 8), "chelsea.png": (6, 9), "coffee.png": (6, 9), "rocket.jpg": (6, 9)}
    for name in sizes:
        shutil.copy(shelf / name, images / name)
        (images / name).with_suffix(".txt").write_text(f"a photograph of {Path(name).stem}")
    summary = run(options=Options(area=256), workers=2)
    shards = Shards(summary.out)
    assert {info.source: (info.rows, info.cols) for info in shards.infos} == sizes
    for i in range(len(shards)):
        patches = shards.read(i).patches.float()
        assert 60 < patches.mean() < 200 and patches.std() > 30  # a photograph, not blank


def test_worker_processes_give_the_same_files(images: Path, run: Run, tmp_path: Path) -> None:
    for i in range(12):
        put(images, f"{i}.png")
    (images / "5.png").write_bytes(b"broken")
    alone, together = run(out=tmp_path / "alone"), run(out=tmp_path / "together", workers=2)
    assert files(alone.out) == files(together.out)
    assert list(alone.skips) == list(together.skips) == ["5.png"]


# --- several captions


def captions(out: Path) -> dict[str, list[str]]:
    return {info.source: info.captions for info in Shards(out).infos}


def test_further_captions_are_further_captions(images: Path, run: Run) -> None:
    put(images, "a.png", "first")
    for number in (10, 2, 7):
        (images / f"a.{number}.txt").write_text(f"number {number}")
    put(images, "b.png", caption=None)
    (images / "b.3.txt").write_text("the only one")
    (images / "nobody.1.txt").write_text("no image")
    (images / "a.02.txt").write_text("not how numbers are written")
    summary = run()
    assert captions(summary.out) == {
        "a.png": ["first", "number 2", "number 7", "number 10"],
        "b.png": ["the only one"],
    }
    assert {file: skip.kind for file, skip in summary.skips.items()} == dict.fromkeys(
        ("nobody.1.txt", "a.02.txt"), "caption without image"
    )
    shards = Shards(summary.out)
    encoder = PromptEncoder(open_checkpoint(BASE))
    for i, caption in enumerate(captions(summary.out)["a.png"]):
        sample = shards.read(0, i)
        ids = encoder.ids(caption)
        assert sample.caption == caption and sample.input_ids.tolist() == ids
        assert torch.equal(sample.text_embeds, encoder.embed(ids))


def test_a_caption_belongs_to_the_image_of_its_very_name(images: Path, run: Run) -> None:
    put(images, "a.png", "of a")
    put(images, "a.1.png", "of a.1")
    (images / "a.2.txt").write_text("of a, too")
    (images / "a.1.1.txt").write_text("of a.1, too")
    assert captions(run().out) == {"a.1.png": ["of a.1", "of a.1, too"], "a.png": ["of a", "of a, too"]}


def test_bad_further_captions_are_notes(images: Path, run: Run) -> None:
    put(images, "a.png", "good")
    (images / "a.1.txt").write_bytes("Bär".encode("latin-1"))
    (images / "a.2.txt").write_text("word " * 5000)
    (images / "a.3.txt").write_text("a <|tms_token|> b")
    (images / "a.4.txt").write_text("good")  # the same once more
    for _ in range(2):
        summary = run()
        assert captions(summary.out) == {"a.png": ["good"]} and not summary.skips
        note = summary.notes["a.png"]
        for reason in ("a.1.txt is not UTF-8", "is too long", "special tokens"):
            assert reason in note
        assert f"note    a.png: {note}" in (summary.out / "report.txt").read_text()
    (images / "a.txt").write_text("\n")
    (images / "a.4.txt").unlink()
    put(images, "b.png")
    assert run().skips["a.png"].kind == "caption not usable"


def test_caption_files_that_a_link_takes_from_elsewhere_are_not_read(
    images: Path, run: Run, tmp_path: Path
) -> None:
    (tmp_path / "secret.txt").write_text("a secret")
    put(images, "a.png", caption=None)
    (images / "a.txt").symlink_to(tmp_path / "secret.txt")
    put(images, "b.png")
    summary = run()
    assert {file: skip.kind for file, skip in summary.skips.items()} == {
        "a.png": "no caption",
        "a.txt": "link leading out",
    }


def test_sentences_in_other_orders(images: Path, run: Run) -> None:
    put(images, "a.png", "A house. A lake. A boat.")
    put(images, "b.png", "only one sentence")
    options = Options(area=64, captions=CaptionOptions(trigger="kotonia style", orders=3))
    found = captions(run(options=options).out)
    assert len(found["a.png"]) == 4 and len(found["b.png"]) == 1
    assert found["a.png"][0] == "kotonia style, A house. A lake. A boat."


# --- several views


SEVERAL = Options(area=(64, 128), crops=2)


def views(out: Path) -> list[tuple[str, str | None]]:
    return [(info.source, info.view) for info in Shards(out).infos]


def test_areas_and_crops_are_samples_of_one_decoded_image(
    images: Path, run: Run, tmp_path: Path, decoded: list[str]
) -> None:
    put(images, "a.png", image=noise(300, 200))
    put(images, "b.png", image=noise(70, 70))
    summary = run(options=SEVERAL, shard_bytes=SMALL_SHARDS)
    expected = [("a.png", view) for view in ("64", "128", "crop1", "crop2")]
    assert views(summary.out) == [*expected, ("b.png", "64"), ("b.png", "crop1"), ("b.png", "crop2")]
    assert decoded == ["a.png", "b.png"]
    infos = list(Shards(summary.out).infos)
    assert len({info.key for info in infos}) == len({(info.source, info.recipe) for info in infos}) == 7
    assert len({info.sha256 for info in infos}) == 7
    assert [(info.rows, info.cols) for info in infos[:2]] == [(2, 2), (3, 5)]
    report = json.loads((summary.out / "report.json").read_text())
    assert report["views"] == {"64": 2, "128": 1, "crop1": 2, "crop2": 2} and report["images"] == 2

    decoded.clear()
    assert counts(run(options=SEVERAL, shard_bytes=SMALL_SHARDS)) == (7, 0, 0) and decoded == []
    before = files(summary.out)
    next(summary.out.glob("shard-000001-*")).unlink()
    again = run(options=SEVERAL, shard_bytes=SMALL_SHARDS)
    assert again.reused and again.new and files(again.out) == before

    fewer = run(options=Options(area=(64, 128), crops=1), shard_bytes=SMALL_SHARDS)
    assert views(fewer.out) == [*expected[:3], ("b.png", "64"), ("b.png", "crop1")]
    fresh = run(out=tmp_path / "fresh", options=Options(area=(128, 64), crops=1), shard_bytes=SMALL_SHARDS)
    assert files(fresh.out).keys() == files(fewer.out).keys()


def test_changed_image_of_known_captions(images: Path, run: Run) -> None:
    path = put(images, "a.png", image=noise(300, 200))
    run(options=SEVERAL)
    noise(300, 200, seed=9).save(path)
    assert counts(run(options=SEVERAL)) == (0, 4, 0)


# --- pairs for editing


@pytest.fixture
def pair(images: Path, golden: Path) -> Path:
    put(images, "a.png", "remove the earphones", noise(64, 96))
    for number in (1, 2):
        shutil.copy(golden / f"edit2_ref{number - 1}.png", images / f"a.ref{number}.png")
    return images


def test_references_are_kept_as_the_model_sees_them(pair: Path, run: Run, golden: Path) -> None:
    summary = run(options=Options(area=96, crops=2))
    shards = Shards(summary.out)
    assert views(summary.out) == [("a.png", None)]  # windows of a target would not match
    assert shards.infos[0].references == [(1, 2), (2, 2)] and (
        shards.infos[0].rows,
        shards.infos[0].cols,
    ) == (3, 2)
    sample = shards.read(0)
    expected = load_file(golden / "edit2.safetensors")["z_init"][6:]
    found = torch.cat([patches for _, patches in sample.references])
    assert torch.equal(found, ((expected + 1) * 127.5).round().to(torch.uint8))
    assert summary.pairs == 1 and "1 pairs for editing" in (summary.out / "report.txt").read_text()
    assert counts(run(options=Options(area=96, crops=2))) == (1, 0, 0)
    noise(64, 64, seed=5).save(pair / "a.ref1.png")
    assert counts(run(options=Options(area=96, crops=2))) == (0, 1, 0)


def test_one_reference_needs_no_number(pair: Path, run: Run) -> None:
    (pair / "a.ref2.png").unlink()
    (pair / "a.ref1.png").rename(pair / "a.ref.png")
    put(pair, "b.ref.png", "an image of that name, with a caption")
    put(pair, "b.png", "its neighbour")
    infos = Shards(run(options=Options(area=96)).out).infos
    assert [(info.source, info.references) for info in infos] == [
        ("a.png", [(2, 3)]),
        ("b.png", []),
        ("b.ref.png", []),
    ]


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (
            lambda f: (f / "a.ref1.png").write_bytes(b"no image"),
            "its reference a.ref1.png: the content is damaged",
        ),
        (lambda f: (f / "a.ref1.png").write_bytes(b""), "its reference a.ref1.png: the file has zero bytes"),
        (
            lambda f: (f / "a.ref1.png").unlink(),
            "its reference 1 is missing: there are a.ref2.png; number them",
        ),
        (
            lambda f: noise(64, 64).save(f / "a.ref2.jpg"),
            "a.ref2.jpg and a.ref2.png are both its reference 2",
        ),
        (
            lambda f: noise(640, 40).save(f / "a.ref1.png"),
            "its reference a.ref1.png: a reference of 640x40 px would",
        ),
        (
            lambda f: ((f / "a.ref2.png").unlink(), (f / "a.ref2.png").symlink_to("/etc/hostname")),
            "its reference a.ref2.png: a symbolic link that leads out",
        ),
    ],
)
def test_bad_reference_is_a_skip_of_the_pair(
    pair: Path, run: Run, spoil: Callable[[Path], object], reason: str
) -> None:
    put(pair, "b.png")
    spoil(pair)
    summary = run(options=Options(area=96))
    assert sources(summary.out) == ["b.png"]
    assert summary.skips["a.png"].kind == "bad reference"
    assert summary.skips["a.png"].reason.startswith(reason)


# --- what may be mirrored, and the report


def test_report_counts_captions_pairs_and_what_may_be_mirrored(pair: Path, run: Run) -> None:
    put(pair, "b.png", "a house")
    put(pair, "c.png", "a cat on the left")
    put(pair, "d.png", "a shop")
    (pair / "b.1.txt").write_text("a red house")
    (pair / "styles.json").write_text('{"d.png": {"tags": ["shopfront"]}}')
    summary = run(options=Options(area=96, keep_direction=("shopfront",)))
    mirrored = {info.source: info.mirrored for info in Shards(summary.out).infos}
    assert mirrored == {"a.png": True, "b.png": True, "c.png": False, "d.png": False}
    report = json.loads((summary.out / "report.json").read_text())
    assert report["captions_an_image"] == {"1": 3, "2": 1}
    assert (report["images"], report["pairs"], report["mirrored_share"], report["views"]) == (4, 1, 0.5, {})
    text = (summary.out / "report.txt").read_text()
    assert "4 images: captions 3 with 1, 1 with 2; 1 pairs for editing; 50% may be mirrored" in text


# --- hostile folders


def test_pipes_folders_and_broken_links_named_like_images(images: Path, run: Run) -> None:
    put(images, "a.png")
    os.mkfifo(images / "pipe.png")
    (images / "folder.png").mkdir()
    put(images, "folder.png/b.png")
    (images / "folder.txt").write_text("of a folder")
    (images / "gone.png").symlink_to(images / "nowhere.png")
    (images / "topipe.png").symlink_to(images / "pipe.png")
    summary = run()
    assert sources(summary.out) == ["a.png", "folder.png/b.png"]
    assert {file: skip.kind for file, skip in summary.skips.items()} == {
        "pipe.png": "not a file",
        "topipe.png": "not a file",
        "folder.txt": "caption without image",
        "gone.png": "broken link",
    }


def test_two_runs_into_one_folder(twelve: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with (
        claimed(out),
        pytest.raises(HdlError, match=f"{out}: another prepare writes into this folder at this moment; wait"),
    ):
        run()
    (out / "prepare.lock").touch()  # of a run that was killed
    assert run().new == 12 and not (out / "prepare.lock").exists()


def test_decoding_processes_do_without_torch() -> None:
    script = (
        "import sys, hdl.data.pictures; assert not {'torch', 'transformers', 'pydantic'} & set(sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script]).returncode == 0


# --- reruns


def test_rerun_redoes_only_what_changed_and_equals_a_fresh_run(
    twelve: Path, run: Run, tmp_path: Path, decoded: list[str]
) -> None:
    run(shard_bytes=SMALL_SHARDS)
    noise(64, 64, seed=99).save(twelve / "03.png")
    (twelve / "05.txt").write_text("another caption")
    put(twelve, "06b.png", "one more")
    (twelve / "08.png").unlink()
    (twelve / "10.txt").unlink()
    decoded.clear()
    again = run(shard_bytes=SMALL_SHARDS)
    assert counts(again) == (8, 3, 2)
    assert decoded == ["03.png", "05.png", "06b.png"]
    fresh = run(out=tmp_path / "fresh", shard_bytes=SMALL_SHARDS)
    assert files(again.out) == files(fresh.out)
    shards = Shards(again.out)
    assert [shards.read(i).caption for i in range(len(shards))][5:8] == [
        "another caption",
        "thing 6",
        "one more",
    ]


def test_rerun_without_changes_does_not_even_copy(twelve: Path, run: Run, decoded: list[str]) -> None:
    first = run(shard_bytes=SMALL_SHARDS)
    inodes = {path.name: path.stat().st_ino for path in first.out.glob("shard-*")}
    decoded.clear()
    second = run(shard_bytes=SMALL_SHARDS)
    assert counts(second) == (12, 0, 0) and decoded == []
    assert {path.name: path.stat().st_ino for path in second.out.glob("shard-*")} == inodes


@pytest.mark.parametrize(
    "options",
    [
        Options(area=32),
        Options(area=96, allow_upscaling=True),
        Options(area=64, captions=CaptionOptions(trigger="kotonia style")),
    ],
)
def test_other_options_redo_everything(twelve: Path, run: Run, tmp_path: Path, options: Options) -> None:
    run()
    again = run(options=options)
    assert counts(again) == (0, 12, 0)
    assert files(again.out) == files(run(out=tmp_path / "fresh", options=options).out)


def test_styles_are_part_of_what_may_change(twelve: Path, run: Run) -> None:
    run()
    (twelve / "styles.json").write_text('{"03.png": {"style": "kotonia", "tags": ["night"]}}')
    again = run()
    assert counts(again) == (11, 1, 0)
    assert [(i.style, i.tags) for i in Shards(again.out).infos[2:4]] == [(None, []), ("kotonia", ["night"])]


def test_killed_run_is_taken_up_and_the_finished_one_before_it_stays_valid(
    twelve: Path, run: Run, tmp_path: Path, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(run(shard_bytes=SMALL_SHARDS).out)
    wide = Options(area=64, captions=CaptionOptions(trigger="kotonia style"))
    with monkeypatch.context() as patch:
        make_sample = hdl.data.prepare.make_sample

        def killed(task, *rest):  # type: ignore[no-untyped-def]
            if task.source == "09.png":
                raise KeyboardInterrupt
            return make_sample(task, *rest)

        patch.setattr(hdl.data.prepare, "make_sample", killed)
        with pytest.raises(KeyboardInterrupt):
            run(options=wide, shard_bytes=SMALL_SHARDS)
    out = tmp_path / "out"
    assert before.items() <= files(out).items()
    assert [Shards(out).read(i).caption for i in (0, 11)] == ["thing 0", "thing 11"]

    with open(out / "unfinished.jsonl", "a") as notes:
        notes.write('{"key": "03-')  # as a power cut would leave it
    decoded.clear()
    summary = run(options=wide, shard_bytes=SMALL_SHARDS)
    assert summary.reused >= 6 and summary.reused + summary.new == 12
    assert len(decoded) == summary.new
    assert files(out) == files(run(out=tmp_path / "fresh", options=wide, shard_bytes=SMALL_SHARDS).out)


def test_killed_first_run_is_taken_up(twelve: Path, run: Run, tmp_path: Path, decoded: list[str]) -> None:
    broken = run(shard_bytes=SMALL_SHARDS)
    fresh = files(broken.out)
    infos = Shards(broken.out).infos
    kept = [info for info in infos if info.shard == infos[0].shard]
    record = Shards(broken.out).index["shards"][0]
    (broken.out / "index.json").unlink()
    lines = [info_to_json(info) for info in kept] + [json.dumps({"version": VERSION, "shard": record})]
    (broken.out / "unfinished.jsonl").write_text("\n".join(lines) + "\n")
    (broken.out / "shard-000003.tmp").write_text("half a shard")
    decoded.clear()
    assert counts(run(shard_bytes=SMALL_SHARDS)) == (len(kept), 12 - len(kept), 0)
    assert files(tmp_path / "out") == fresh


def test_rerun_repairs_cut_off_and_lost_files(twelve: Path, run: Run) -> None:
    summary = run(shard_bytes=SMALL_SHARDS)
    before = files(summary.out)
    shards = sorted(summary.out.glob("shard-*.tar"))
    with open(shards[1], "r+b") as file:
        file.truncate(5000)
    shards[2].unlink()
    again = run(shard_bytes=SMALL_SHARDS)
    assert again.new == sum(s["samples"] for s in Shards(again.out).index["shards"][1:3])
    assert files(again.out) == before
    next(again.out.glob("samples-*")).unlink()
    assert run(shard_bytes=SMALL_SHARDS).new == 12
    assert files(again.out) == before


def test_rerun_names_a_shard_that_rotted_and_what_to_do(twelve: Path, run: Run) -> None:
    summary = run()
    shards = Shards(summary.out)
    info = shards.infos[3]
    with open(summary.out / info.shard, "r+b") as file:
        file.seek(info.offset + 1000)
        file.write(b"\0rot\0")
    put(twelve, "new.png")
    with pytest.raises(
        HdlError, match=f"{info.shard}: sample {info.key} .of 03.png. is damaged: .* delete it"
    ):
        run()
    assert Shards(summary.out).read(2).caption == "thing 2"
    (summary.out / info.shard).unlink()
    assert counts(run()) == (0, 13, 0)


def test_going_back_after_a_killed_run_with_other_options(
    twelve: Path, run: Run, decoded: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run(shard_bytes=SMALL_SHARDS)

    def killed(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(hdl.data.shard_writer.ShardWriter, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            run(options=Options(area=32), shard_bytes=6000)  # a shard a sample: all but the last are kept
    decoded.clear()
    assert counts(run(shard_bytes=SMALL_SHARDS)) == (12, 0, 0) and decoded == []


def test_full_disk_keeps_what_is_finished(
    twelve: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(hdl.data.shard_writer.os, "replace", full)
        with pytest.raises(HdlError, match=r"writing stopped .No space left on device.; make room"):
            run()
    assert run().new == 12
    assert not list((tmp_path / "out").glob("*.tmp"))


def test_disk_that_is_full_in_the_middle_of_a_shard(
    twelve: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here at the 90,000th byte; what was finished before is taken over."""
    room = [90_000]
    write = hdl.data.shard_writer._HashedFile.write

    def limited(file, data):  # type: ignore[no-untyped-def]
        room[0] -= len(data)
        if room[0] < 0:
            raise OSError(28, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(hdl.data.shard_writer._HashedFile, "write", limited)
        with pytest.raises(HdlError, match=r"writing stopped .No space left on device.; make room"):
            run(shard_bytes=SMALL_SHARDS)
    out = tmp_path / "out"
    assert not list(out.glob("*.tmp")) and list(out.glob("shard-*.tar"))
    summary = run(shard_bytes=SMALL_SHARDS)
    assert summary.reused >= 2 and summary.reused + summary.new == 12
    assert files(out) == files(run(out=tmp_path / "fresh", shard_bytes=SMALL_SHARDS).out)


# --- what is refused


def test_no_folder_or_an_empty_one(tmp_path: Path, images: Path, run: Run) -> None:
    with pytest.raises(
        HdlError, match=r"no image there in any depth .other files: 0.; expected files in .avif"
    ):
        run()
    (images / "a.txt").write_text("only a caption")
    with pytest.raises(HdlError, match=r"no image there in any depth .other files: 1."):
        run()
    with pytest.raises(HdlError, match="nowhere: no such folder"):
        prepare(tmp_path / "nowhere", tmp_path / "out", BASE)
    with pytest.raises(HdlError, match=r"a.txt: not a folder"):
        prepare(images / "a.txt", tmp_path / "out", BASE)
    assert not (tmp_path / "out").exists()


def test_no_usable_pair_is_an_error_with_counts(images: Path, run: Run, tmp_path: Path) -> None:
    put(images, "a.png", caption=None)
    put(images, "b.png", caption=None)
    put(images, "c.png").write_bytes(b"")
    with pytest.raises(HdlError) as error:
        run()
    assert "no usable image with a caption (2 × no caption, 1 × empty file)" in str(error.value)
    assert "for example a.png: there is no caption: expected a file a.txt" in str(error.value)
    assert "skipped c.png: the file has zero bytes" in (tmp_path / "out" / "report.txt").read_text()
    put(images, "a.png")
    assert run().new == 1


def test_no_usable_pair_leaves_earlier_shards_alone(images: Path, run: Run) -> None:
    caption = put(images, "a.png").with_suffix(".txt")
    out = run().out
    before = files(out)
    caption.unlink()
    with pytest.raises(HdlError, match="no usable image"):
        run()
    assert files(out) == before


@pytest.mark.parametrize("place", ["file", "file/below", "/proc/hdl"])
def test_output_that_cannot_be_written(twelve: Path, tmp_path: Path, place: str) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(HdlError, match="the output folder cannot be written"):
        prepare(twelve, tmp_path / place, BASE)
    assert (tmp_path / "file").read_text() == "in the way"


def test_output_folder_of_something_else(twelve: Path, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.tex").write_text("years of work")
    with pytest.raises(HdlError, match=r"holds something that is not hdl shards \(thesis.tex\); name a new"):
        run()
    with pytest.raises(HdlError, match=r"holds something that is not hdl shards \(00.png, 00.txt, .*, …\)"):
        run(out=twelve)
    (out / "index.json").write_text('{"another": "program"}')
    with pytest.raises(HdlError, match="not an index of hdl shards"):
        run()
    assert sorted(path.name for path in out.iterdir()) == ["index.json", "thesis.tex"]


def test_shards_of_other_images(twelve: Path, run: Run, tmp_path: Path) -> None:
    before = files(run().out)
    put(tmp_path / "others", "dog.png")
    with pytest.raises(HdlError, match=r"holds shards of other images \(00.png, …\), none of which is in"):
        prepare(tmp_path / "others", tmp_path / "out", BASE)
    assert files(tmp_path / "out") == before


def test_shards_of_another_base(twelve: Path, run: Run, tmp_path: Path) -> None:
    before = files(run().out)
    with pytest.raises(HdlError, match="shards of another base"):
        prepare(twelve, tmp_path / "out", BASE, random_init=True, options=Options(area=64))
    assert files(tmp_path / "out") == before


def test_checkpoint_without_tokenizer(twelve: Path, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    shutil.copy(BASE / "config.json", base)
    with pytest.raises(HdlError, match="base: no tokenizer there"):
        prepare(twelve, tmp_path / "out", base, random_init=True)


def test_random_base_and_config_from_elsewhere(twelve: Path, tmp_path: Path) -> None:
    out = prepare(twelve, tmp_path / "out", BASE, random_init=True, options=Options(area=64)).out
    assert Shards(out).index["base"]["fingerprint"].startswith("random:")
    base = tmp_path / "base"
    shutil.copytree(BASE, base)
    for path in [*base.glob("*token*"), base / "config.json"]:
        path.unlink()
    out = prepare(twelve, tmp_path / "out2", base, config_from=BASE, options=Options(area=64)).out
    assert len(Shards(out)) == 12


def test_bad_numbers(twelve: Path, run: Run) -> None:
    with pytest.raises(HdlError, match="--area: found 31, expected at least 32"):
        run(options=Options(area=(64, 31)))
    with pytest.raises(HdlError, match="--crops: found -1, expected 0 or more"):
        run(options=Options(area=64, crops=-1))
    with pytest.raises(HdlError, match="--shuffle-sentences: found -2, expected 0 or more"):
        run(options=Options(area=64, captions=CaptionOptions(orders=-2)))
    with pytest.raises(HdlError, match="--workers: found -1, expected 0"):
        run(workers=-1)


def test_command_line(twelve: Path, tmp_path: Path) -> None:
    (twelve / "styles.json").write_text('{"03.png": {"style": "kotonia", "tags": ["night"]}}')
    command = [sys.executable, str(ROOT / "tools" / "prepare.py"), str(twelve), str(tmp_path / "out")]
    command += ["--base", str(BASE), "--area", "64", "--workers", "0", "--trigger", "kotonia style"]
    command += ["--trigger-styles", "kotonia", "--tag-descriptor", "night=dark sky"]
    command += ["--crops", "1", "--keep-direction", "night", "--shuffle-sentences", "2", "--report"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "24 samples in 1 shard(s): reused 0, new 24, removed 0" in done.stdout
    assert "     64 x 64             4        12" in done.stdout
    infos = [info for info in Shards(tmp_path / "out").infos if info.view == "64"]
    assert [info.captions for info in infos[2:4]] == [["thing 2"], ["kotonia style, thing 3, dark sky"]]
    assert [info.mirrored for info in infos[2:4]] == [True, False]
    page = (tmp_path / "out" / "report.html").read_text()
    assert f"report: {tmp_path}/out/report.html" in done.stdout and page.count("data:image/webp") >= 3
    (tmp_path / "out" / "index.json").unlink()  # a folder with a report is still one of shards
    assert prepare(twelve, tmp_path / "out", BASE, options=Options(area=64)).new == 12

    command[2] = str(tmp_path / "nowhere")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such folder")
