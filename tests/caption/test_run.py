"""Captioning a folder by a server: what is written, what is left alone, and what a second run does."""

import base64
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from multiprocessing.dummy import DummyProcess
from pathlib import Path

import pytest
from PIL import Image

from hdl.caption.records import temporary_of
from hdl.caption.run import caption
from hdl.caption.server import Server
from hdl.caption.settings import Settings
from hdl.caption.summary import Summary, describe
from hdl.data.files import list_folder
from hdl.errors import HdlError
from hdl.seeds import derive_seed
from tests.caption.block_pictures import NAMES, put
from tests.caption.stub_server import StubServer

TOOL = Path(__file__).parents[2] / "tools" / "caption.py"
FILES = ("a.txt", "b.txt", "c.txt", "sub/d.txt")
Run = Callable[..., Summary]
Serve = Callable[..., StubServer]


def texts(images: Path) -> dict[str, str]:
    return {path.relative_to(images).as_posix(): path.read_text() for path in sorted(images.rglob("*.txt"))}


def counts(summary: Summary) -> dict[str, int]:
    return {kind: len(outcomes) for kind, outcomes in summary.by_kind.items() if outcomes}


def test_every_image_gets_its_caption_with_what_goes_around_it(images: Path, run: Run, serve: Serve) -> None:
    (images / "styles.json").write_text('{"b.jpg": {"style": "ink", "tags": ["nsfw"]}}')
    server = serve(lambda number, body: "A house.")
    summary = run(
        server, trigger="kotonia style", tag_descriptors={"nsfw": "explicit content"}, prompt="{tags}?"
    )
    assert texts(images) == {
        "a.txt": "kotonia style, A house.\n",
        "b.txt": "kotonia style, A house, explicit content\n",
        "c.txt": "kotonia style, A house.\n",
        "sub/d.txt": "kotonia style, A house.\n",
    }
    assert counts(summary) == {"written": 4}
    assert sorted(body["messages"][0]["content"][1]["text"] for body in server.bodies) == ["none?"] * 3 + [
        "nsfw?"
    ]
    page = summary.sheet.read_text()
    assert summary.sheet == images.parent / "images.captions.html"
    assert all(f">{name}<" in page for name in NAMES) and page.count("kotonia style, A house.") == 3


def test_a_second_run_asks_nothing_and_writes_the_sheet_again(images: Path, run: Run, serve: Serve) -> None:
    server = serve()
    run(server)
    before = texts(images)
    server.close()
    summary = run(server)  # the server is gone, and not missed
    assert counts(summary) == {"kept": 4} and texts(images) == before


def test_captions_by_hand_are_left_alone_and_named(images: Path, run: Run, serve: Serve) -> None:
    (images / "a.txt").write_text("my own words")
    (images / "c.txt").write_text("\n")  # an empty file holds nobody's words
    server = serve()
    assert counts(run(server)) == {"written": 3, "by hand": 1}
    (images / "b.txt").write_text("edited")
    (images / "sub/d.txt").write_bytes("Bär".encode("latin-1"))
    summary = run(server, prompt="another question")
    assert counts(summary) == {"written": 1, "by hand": 3}
    assert [o.name for o in summary.by_kind["by hand"]] == ["a.txt", "b.txt", "sub/d.txt"]
    assert "by hand: b.txt" in describe(summary)
    assert (images / "a.txt").read_text() == "my own words" and (images / "b.txt").read_text() == "edited"
    assert "by hand" in summary.sheet.read_text() and "my own words" in summary.sheet.read_text()
    assert counts(run(server, prompt="another question", overwrite=True)) == {"written": 3, "kept": 1}
    assert "own" not in (images / "a.txt").read_text()


def test_changed_rules_reword_without_asking_and_other_changes_ask(
    images: Path, run: Run, serve: Serve
) -> None:
    server = serve(lambda number, body: "The image shows a house.")
    run(server)
    rules = {"replace": [{"pattern": "^The image shows ", "with": ""}], "trigger": "kotonia style"}
    assert counts(run(server, **rules)) == {"reworded": 4} and len(server.bodies) == 4
    assert set(texts(images).values()) == {"kotonia style, a house.\n"}
    assert counts(run(server)) == {"reworded": 4} and len(server.bodies) == 4
    (images / "a.txt").unlink()  # deleted to have it again
    put(images, "b.jpg", seed=99)  # another picture of that name
    assert counts(run(server)) == {"written": 2, "kept": 2} and len(server.bodies) == 5
    assert counts(run(server, max_new_tokens=7)) == {"written": 4}
    assert server.bodies[-1]["max_tokens"] == 7


def test_a_caption_and_its_record_survive_a_kill_at_any_point(images: Path, run: Run, serve: Serve) -> None:
    server = serve()
    run(server)
    before = texts(images)
    (images / "a.txt").unlink()  # killed after the record, before the caption
    temporary_of(images / "a.txt").write_text("half")
    (images / ".captions.jsonl").open("a").write('{"file": "b.txt", "answ')  # killed within a record
    assert counts(run(server)) == {"written": 1, "kept": 3}
    assert len(server.bodies) == 4 and texts(images) == before
    assert not list(images.glob(".*.tmp"))
    (images / ".captions.jsonl").open("a").write('{"file": "b.txt", "answ')
    assert counts(run(server, prompt="new")) == {"written": 4}
    assert counts(run(server, prompt="new")) == {"kept": 4}, "a half record does not spoil the one after it"
    (images / "c.txt").unlink()
    (images / ".captions.jsonl").write_text("")  # records lost: all that is there is a person's
    assert counts(run(server)) == {"written": 1, "by hand": 3}
    assert counts(run(server)) == {"kept": 1, "by hand": 3}


def test_a_failed_write_leaves_the_earlier_caption_whole(
    images: Path, run: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = serve()
    run(server)
    before = texts(images)

    def full(*paths: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as context:
        context.setattr("os.replace", full)
        with pytest.raises(HdlError, match="writing stopped .No space left on device.; make room"):
            run(server, prompt="new", batch_size=1)
    assert texts(images) == before
    for thread in threading.enumerate():
        if isinstance(thread, DummyProcess):  # of the pool: its request was under way, and counts as asked
            thread.join(30)
    asked = len(server.bodies)
    assert counts(run(server, prompt="new")) == {"reworded": 1, "written": 3}, "its answer was on record"
    assert len(server.bodies) == asked + 3


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGKILL, -9), (signal.SIGINT, 130)])
def test_a_killed_run_goes_on_where_it_stopped(images: Path, serve: Serve, sent: int, status: int) -> None:
    for seed in range(8):
        put(images, f"more{seed}.png", 100 + seed)
    stuck = serve(lambda number, body: time.sleep(0 if number < 5 else 60) or f"Picture {number}.")
    command = [sys.executable, str(TOOL), str(images), "--model", "stub", "--batch-size", "2", "--server"]
    tool = subprocess.Popen(
        [*command, stuck.url],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        # Where the tests run in a shell's background, it would inherit that Ctrl-C is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while len(stuck.bodies) < 7 and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    tool.send_signal(sent)
    assert tool.wait(timeout=40) == status, "it must not wait for the answers that hang"
    done = texts(images)
    assert len(done) == 5 and all(
        text.startswith("Picture ") and text.endswith(".\n") for text in done.values()
    )

    server = serve(lambda number, body: "Later.")
    summary = caption(images, Settings(model="stub", server=server.url))
    assert summary and counts(summary) == {"written": 7, "kept": 5} and len(server.bodies) == 7
    assert texts(images).items() >= done.items()


def test_two_ranks_share_a_folder_without_overlap_or_loss(images: Path, run: Run, serve: Serve) -> None:
    put(images, "e.png", 7)
    server = serve()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [
        *torchrun,
        str(TOOL),
        str(images),
        "--model",
        "stub",
        "--server",
        server.url,
        "--batch-size",
        "1",
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("5 images, 5 captions") == 1 and "     5 written" in done.stdout
    urls = [body["messages"][0]["content"][0]["image_url"]["url"] for body in server.bodies]
    assert len(urls) == len(set(urls)) == 5
    assert sorted(texts(images)) == sorted([*FILES, "e.txt"])
    page = (images.parent / "images.captions.html").read_text()
    assert all(text.strip() in page for text in texts(images).values())
    assert counts(run(server)) == {"kept": 5}, "one process knows what two have done"


def test_failing_requests_are_repeated(images: Path, run: Run, serve: Serve) -> None:
    statuses = iter([500, 429, 503, 500, 502])

    def flaky(number: int, body: object) -> object:
        status = next(statuses, None)
        return (status, "busy") if status else f"Picture {number}."

    assert counts(run(serve(flaky))) == {"written": 4}


def test_one_image_that_the_server_fails_on_does_not_stop_the_others(
    images: Path, run: Run, serve: Serve
) -> None:
    def reply(number: int, body: dict) -> object:  # type: ignore[type-arg]
        return (400, "bad <image>") if "b.jpg" in asked[body["seed"]] else "Fine."

    asked = Asked(images)
    summary = run(serve(reply))
    assert counts(summary) == {"written": 3, "server error": 1}
    assert "server error: b.txt: the server answered 400: 'bad <image>'" in describe(summary)
    assert "bad &lt;image&gt;" in summary.sheet.read_text()


def test_a_name_as_long_as_names_can_be(images: Path, run: Run, serve: Serve) -> None:
    (images / "a.png").rename(images / f"{'日本' * 41}xyz.png")  # 253 bytes
    assert counts(run(serve(lambda number, body: "Fine."))) == {"written": 4}
    assert (images / f"{'日本' * 41}xyz.txt").read_text() == "Fine.\n"


@pytest.mark.parametrize(
    "content", [[{"type": "text", "text": "A red"}, {"type": "text", "text": " thing."}], 5, {}]
)
def test_an_answer_in_parts_or_of_another_kind(images: Path, run: Run, serve: Serve, content: object) -> None:
    choices = json.dumps({"choices": [{"message": {"content": content}, "finish_reason": "stop"}]})
    server = serve(lambda number, body: (200, choices))
    if isinstance(content, list):
        assert counts(run(server)) == {"written": 4}
        assert (images / "a.txt").read_text() == "A red thing.\n"
    else:
        with pytest.raises(HdlError, match="expected a chat completion"):
            run(server)


@pytest.mark.parametrize(
    "models", ["[]", '"hi"', '{"data": null}', '{"data": [{"name": "m"}]}', "[" * 200_000]
)
def test_a_list_of_models_that_is_none(images: Path, run: Run, serve: Serve, models: str) -> None:
    server = serve(lambda number, body: "Fine.")
    server.models = models
    with pytest.raises(HdlError, match="expected a list of models|expected JSON"):
        run(server)


@pytest.mark.parametrize("url", ["http://localhost:abc/v1", "http://[::1"])
def test_a_url_that_is_none(url: str) -> None:
    with pytest.raises(HdlError, match="--server .*no URL"):
        Server(Settings(server=url))


def test_a_key_that_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-café")
    with pytest.raises(HdlError, match="OPENAI_API_KEY: holds letters that no key has"):
        Server(Settings(server="http://localhost:1/v1"))


class Asked:
    """Which image a request's seed belongs to."""

    def __init__(self, images: Path, numbers: int = 1) -> None:
        self.names = {
            derive_seed(0, "caption", hashlib.sha256((images / name).read_bytes()).hexdigest(), number)
            % 2**31: f"{name} {number}"
            for name in NAMES
            for number in range(numbers)
        }

    def __getitem__(self, seed: int) -> str:
        return self.names.get(seed, "again")


def test_refusals_and_empty_answers_are_counted_and_write_nothing(
    images: Path, run: Run, serve: Serve
) -> None:
    asked = Asked(images)
    odd = {"a.png 0": "I'm sorry, but I can't.", "c.png 0": ""}
    server = serve(lambda number, body: odd.get(asked[body["seed"]], "Fine."))
    summary = run(server)
    assert counts(summary) == {"written": 2, "empty": 1, "refused": 1}
    assert list(texts(images)) == ["b.txt", "sub/d.txt"] and len(server.bodies) == 4
    assert any(
        line.startswith("refused: a.txt: the model refused: \"I'm sorry") for line in describe(summary)
    )
    # drawn answers differ with the seed, so that asking once more may help
    assert counts(run(server, temperature=1.0)) == {"written": 4} and len(server.bodies) == 10
    stubborn = serve(lambda number, body: "I cannot.")
    assert counts(run(stubborn, temperature=0.5)) == {"refused": 4} and len(stubborn.bodies) == 8
    assert "the earlier caption stays" in "\n".join(describe(run(stubborn, temperature=0.5)))


def test_several_captions_of_an_image(images: Path, run: Run, serve: Serve) -> None:
    asked = Asked(images, 3)
    server = serve(lambda number, body: f"Words {asked[body['seed']]}.")
    summary = run(server, captions_per_image=3, temperature=0.8)
    assert counts(summary) == {"written": 12}
    assert texts(images)["sub/d.txt"] == "Words sub/d.webp 0.\n"
    assert texts(images)["sub/d.2.txt"] == "Words sub/d.webp 2.\n"
    page = summary.sheet.read_text()
    assert all(f"Words {name} {number}." in page for name in NAMES for number in range(3))
    assert server.bodies[0]["temperature"] == 0.8


def test_unreadable_images_are_counted_once_and_named(images: Path, run: Run, serve: Serve) -> None:
    (images / "a.png").write_bytes(b"")
    (images / "c.png").write_bytes((images / "c.png").read_bytes()[:100])
    summary = run(serve(), captions_per_image=2, temperature=1)
    assert counts(summary) == {"written": 4, "unreadable": 2}
    assert "unreadable: a.png: the file has zero bytes" in describe(summary)


def test_cut_answers_are_trimmed_and_told(images: Path, run: Run, serve: Serve) -> None:
    summary = run(serve(lambda number, body: "A house. It has a r|"))
    assert set(texts(images).values()) == {"A house.\n"}
    assert any("4 answers ended at max_new_tokens" in line for line in describe(summary))


def test_the_request(images: Path, run: Run, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = serve()
    run(server, max_side=48, batch_size=4)
    assert server.headers[0]["Authorization"] == "Bearer secret"
    assert server.most_in_flight > 1
    head, data = server.bodies[0]["messages"][0]["content"][0]["image_url"]["url"].split(",")
    assert head == "data:image/jpeg;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).size == (48, 32)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"server": "http://127.0.0.1:9/v1"}, "the server does not answer"),
        ({"model": "other"}, "has no model 'other', only 'stub'"),
        ({"tag_descriptors": {"nsfw": "x"}}, "no image in styles.json has 'nsfw'"),
        ({"prompt": "its {tags}"}, "found {tags}, but no image has a style or tags"),
    ],
)
def test_what_cannot_work_is_said_before_anything_is_asked(
    images: Path, run: Run, serve: Serve, settings: dict[str, object], message: str
) -> None:
    server = serve()
    with pytest.raises(HdlError) as error:
        run(server, **settings)
    assert message in str(error.value)
    assert not server.bodies and not texts(images)


def test_a_server_that_dies_ends_the_run_and_keeps_what_it_gave(images: Path, run: Run, serve: Serve) -> None:
    server = serve(lambda number, body: "Fine." if number < 2 else (401, "who are you?"))
    with pytest.raises(HdlError, match=r"401: 'who are you\?'.*OPENAI_API_KEY"):
        run(server, batch_size=1)
    assert len(texts(images)) == 2
    with pytest.raises(HdlError, match=r"404.*up to and with /v1"):
        run(server, server=server.url.removesuffix("/v1"), prompt="new")
    with pytest.raises(HdlError, match="expected a chat completion"):
        run(serve(lambda number, body: (200, '{"choices": []}')), prompt="new")


def test_two_images_with_one_caption_file_are_refused(images: Path, run: Run, serve: Serve) -> None:
    put(images, "a.1.png", 5)
    assert counts(run(serve())) == {"written": 5}
    with pytest.raises(HdlError, match=r"a\.1\.png and a\.png would share the caption a\.1\.txt"):
        run(serve(), captions_per_image=2, temperature=1)
    put(images, "a.webp", 6)
    with pytest.raises(HdlError, match=r"a\.png and a\.webp would share the caption a\.txt"):
        run(serve())


def test_bad_places_are_named(images: Path, tmp_path: Path, run: Run, serve: Serve) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(HdlError, match="no image there"):
        caption(tmp_path / "empty", Settings())
    with pytest.raises(HdlError, match=r"--sheet: found .*x\.png, expected a path ending in \.html"):
        caption(images, Settings(), sheet=images / "x.png")
    (images / ".captions.jsonl").mkdir()
    with pytest.raises(HdlError, match="the records of captions cannot be written"):
        run(serve())


def test_records_are_lines_of_json_beside_which_prepare_sees_captions_only(
    images: Path, run: Run, serve: Serve
) -> None:
    run(serve())
    lines = [json.loads(line) for line in (images / ".captions.jsonl").read_text().splitlines()]
    assert sorted(line["file"] for line in lines) == list(FILES)
    assert {line["model"] for line in lines} == {"stub"}
    folder = list_folder(images, leave_out=images.parent / "out")
    assert sorted(folder.images) == list(NAMES) and not folder.skips
