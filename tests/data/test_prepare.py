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
from image_folders import BASE, noise, put
from PIL import Image

import hdl.data.prepare
from hdl.data.captions import CaptionOptions
from hdl.data.prepare import Options, Summary, prepare
from hdl.data.shards import VERSION, Shards
from hdl.errors import HdlError

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
    original = hdl.data.prepare.picture_or_skip

    def spy(job):  # type: ignore[no-untyped-def]
        answer = original(job)
        if isinstance(answer, tuple) and answer[1] is not None:
            names.append(Path(job.path).name)
        return answer

    monkeypatch.setattr(hdl.data.prepare, "picture_or_skip", spy)
    return names


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


# --- reruns


@pytest.fixture
def twelve(images: Path) -> Path:
    for i in range(12):
        put(images, f"{i:02}.png", f"thing {i}", noise(64, 64, seed=i))
    return images


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
        notes.write('{"version": 1, "sha')  # as a power cut would leave it
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
    note = {"version": VERSION, "shard": record, "samples": [vars(info) for info in kept]}
    (broken.out / "index.json").unlink()
    (broken.out / "unfinished.jsonl").write_text(json.dumps(note) + "\n")
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
        run(options=Options(area=31))
    with pytest.raises(HdlError, match="--workers: found -1, expected 0"):
        run(workers=-1)


def test_command_line(twelve: Path, tmp_path: Path) -> None:
    (twelve / "styles.json").write_text('{"03.png": {"style": "kotonia", "tags": ["night"]}}')
    command = [sys.executable, str(ROOT / "tools" / "prepare.py"), str(twelve), str(tmp_path / "out")]
    command += ["--base", str(BASE), "--area", "64", "--workers", "0", "--trigger", "kotonia style"]
    command += ["--trigger-styles", "kotonia", "--tag-descriptor", "night=dark sky"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "12 samples in 1 shard(s): reused 0, new 12, removed 0" in done.stdout
    assert "     64 x 64             4        12" in done.stdout
    captions = [info.captions[0] for info in Shards(tmp_path / "out").infos]
    assert captions[2:4] == ["thing 2", "kotonia style, thing 3, dark sky"]

    command[2] = str(tmp_path / "nowhere")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path}/nowhere: no such folder")
