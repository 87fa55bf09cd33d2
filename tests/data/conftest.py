"""An images folder, and preparing it with the tiny checkpoint."""

from collections.abc import Callable
from pathlib import Path

import pytest

from hdl.data.prepare import Options, Summary, prepare
from tests.data.image_folders import BASE

AREA_64 = Options(area=64)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    return folder


@pytest.fixture
def run(images: Path, tmp_path: Path) -> Callable[..., Summary]:
    """Prepare `images` into tmp_path/out with the tiny checkpoint."""

    def run(out: Path = tmp_path / "out", options: Options = AREA_64, **more: object) -> Summary:
        return prepare(images, out, BASE, options=options, **more)  # type: ignore[arg-type]

    return run
