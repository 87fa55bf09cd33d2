"""Real runs of train.py: photographs prepared with the tiny base, trained for a few steps in processes of
their own, as a user would start them."""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import tomli_w
from PIL import Image
from skimage import data as photographs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from hdl.data.prepare import Options, prepare
from tests.engine.forked import Server

REPOSITORY = Path(__file__).parents[2]
PHOTOGRAPHS = ("astronaut", "coffee", "chelsea", "rocket", "camera", "coins")


@dataclass(frozen=True)
class Finished:
    """A run that ended, well or not."""

    status: int
    printed: str
    output: Path

    def curve(self, name: str) -> dict[int, float]:
        """A TensorBoard scalar: step -> value, over all starts of the run."""
        events = EventAccumulator(str(self.output / "tensorboard")).Reload()
        return {event.step: event.value for event in events.Scalars(name)}

    def curve_names(self) -> list[str]:
        return EventAccumulator(str(self.output / "tensorboard")).Reload().Tags()["scalars"]


@pytest.fixture(scope="session")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOGRAPHS:
        Image.fromarray(getattr(photographs, name)()).save(folder / f"{name}.png")
        (folder / f"{name}.txt").write_text(f"a photograph of {name}, " + "in detail " * len(name))
    return folder


@pytest.fixture(scope="session")
def shards(photos: Path, tiny_base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    prepare(photos, out, tiny_base, options=Options(area=128))
    return out


Launch = Callable[..., Finished]


@pytest.fixture
def launch(server: Server, shards: Path, tiny_base: Path, tmp_path: Path) -> Launch:
    """Start train.py on `processes` processes (1: without torchrun) and wait for its end. script: another
    one in its place."""

    def start(
        output: str = "run", processes: int = 1, script: str | Path = "train.py", **options: object
    ) -> Finished:
        described: dict[str, dict[str, object]] = {
            "model": {"base": str(tiny_base)},
            "data": {"shards": str(shards)},
            "lora": {"rank": 4},
            "train": {"steps": 4, "batch_size": 4, "lr": 1e-2, "warmup_steps": 2, "seed": 3},
            "save": {"output": str(tmp_path / output), "every": 2},
            "validation": {"every": 2},
        }
        flags = ["--resume"] if options.pop("resume", False) else []
        for name, value in options.items():
            section, field = name.split("__")
            described.setdefault(section, {})[field] = (
                value if isinstance(value, (int, float, list)) else str(value)
            )
        config = tmp_path / f"{output.replace(chr(47), chr(45))}.toml"
        config.write_text(tomli_w.dumps(described))
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "TRITON_INTERPRET": "0", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        ranks = processes if processes > 1 else 0
        job = server.start([str(config), *flags], ranks, script=script, **environment)
        return Finished(job.wait(600), job.printed, tmp_path / output)

    return start


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Starts jobs of several ranks in a second (tests/engine/forked.py)."""
    with Server(tmp_path_factory.mktemp("jobs")) as started:
        yield started


@pytest.fixture
def described(shards: Path, tiny_base: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """The arguments of a small run into tmp_path/NAME, with more of them as given."""

    def arguments(name: str, **options: object) -> list[str]:
        usual: dict[str, object] = {
            "model__base": tiny_base, "data__shards": shards, "lora__rank": 4, "lora__dropout": 0.1,
            "train__steps": 12, "train__batch_size": 4, "train__lr": 1e-2, "train__warmup_steps": 2,
            "train__schedule": "cosine", "train__seed": 3, "save__every": 3, "save__output": tmp_path / name,
        }  # fmt: skip
        flags = {"--" + option.replace("__", "."): str(value) for option, value in (usual | options).items()}
        return [word for flag in flags.items() for word in flag]

    return arguments
