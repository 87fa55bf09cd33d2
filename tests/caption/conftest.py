"""Folders of small pictures, a server that stands in for a model, and a tiny model."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from hdl.caption.run import caption
from hdl.caption.settings import Settings
from hdl.caption.summary import Summary
from tests.caption.block_pictures import NAMES, put
from tests.caption.stub_server import StubServer
from tests.caption.tiny_vlm import make_tiny_vlm


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Four pictures of coloured blocks, one of them in a subfolder."""
    for seed, name in enumerate(NAMES):
        put(tmp_path / "images", name, seed)
    return tmp_path / "images"


@pytest.fixture
def serve(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., StubServer]]:
    monkeypatch.setattr("hdl.caption.server.BACKOFF", 0.01)
    started: list[StubServer] = []

    def serve(reply: Callable[..., object] = lambda number, body: f"Picture {number}.") -> StubServer:
        started.append(StubServer(reply))  # type: ignore[arg-type]
        return started[-1]

    yield serve
    for server in started:
        server.close()


@pytest.fixture
def run(images: Path) -> Callable[..., Summary]:
    """Caption `images` by the stub server."""

    def run(server: StubServer, /, overwrite: bool = False, **settings: object) -> Summary:
        described = {"server": server.url, "model": "stub", "batch_size": 2, **settings}
        summary = caption(images, Settings.model_validate(described), overwrite=overwrite)
        assert summary
        return summary

    return run


@pytest.fixture(scope="session")
def tiny_vlm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "vlm"
    make_tiny_vlm(folder)
    return folder
