"""Two nodes joined by a cable: torchrun meets over it, and a run survives its being cut."""

import os
import re
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.engine.conftest import REPOSITORY
from tests.launch.conftest import ENVIRONMENT, STEPS, Describe, Described, clean
from tests.launch.two_nodes import Node, lacking, two_nodes

pytestmark = [
    pytest.mark.job,
    pytest.mark.skipif(lacking() is not None, reason=f"no nodes here: {lacking()}"),
]
PORT = 29411
PATIENCE = 20.0  # train.patience, seconds; 60 is the goal until both nodes have ended


@pytest.fixture(scope="module")
def nodes() -> Iterator[tuple[Node, Node]]:
    with two_nodes() as made:
        yield made


class Pair:
    """launch/node.sh on each of two nodes, with the same run."""

    def __init__(self, nodes: tuple[Node, Node], run: Described, folder: Path, *flags: str) -> None:
        self.logs = [folder / f"node{number}.log" for number in (0, 1)]
        self.processes = []
        for number, (place, log) in enumerate(zip(nodes, self.logs)):
            environment = clean(os.environ) | ENVIRONMENT
            environment |= {
                "NODES": "2",
                "NODE_RANK": str(number),
                "RENDEZVOUS": f"{nodes[0].address}:{PORT}",
            }
            with log.open("wb") as file:
                self.processes.append(
                    place.start(
                        REPOSITORY / "launch" / "node.sh",
                        run.config,
                        *flags,
                        cwd=REPOSITORY,
                        env=environment,
                        log=file,
                    )
                )

    def statuses(self, seconds: float) -> list[int | None]:
        """Once both have ended; None for one that has not within that time."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and any(process.poll() is None for process in self.processes):
            time.sleep(0.1)
        return [process.poll() for process in self.processes]

    def told(self) -> list[str]:
        return [log.read_text(errors="replace") for log in self.logs]


def test_zero3_over_a_cable_is_the_run_of_one_process(
    nodes: tuple[Node, Node], describe: Describe, alone: Described, tmp_path: Path
) -> None:
    run = describe("zero3", deepspeed=str(REPOSITORY / "ds_configs" / "zero3.json"))
    pair = Pair(nodes, run, tmp_path)
    assert pair.statuses(400) == [0, 0], pair.told()
    assert "on 2 process(es) on cpu" in "".join(pair.told())
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-4)


def test_zero2_and_the_cable_cut(
    nodes: tuple[Node, Node],
    describe: Describe,
    alone: Described,
    undisturbed: Described,
    tmp_path: Path,
) -> None:
    run = describe("cut", patience=PATIENCE)
    pair = Pair(nodes, run, tmp_path)
    until = time.monotonic() + 400
    while not run.saved():
        assert time.monotonic() < until and pair.statuses(0.1) == [None, None], pair.told()
    nodes[1].cable("down")
    cut = time.monotonic()
    try:
        statuses = pair.statuses(120)
        took = time.monotonic() - cut
    finally:
        nodes[1].cable("up")
    told = pair.told()
    assert None not in statuses and 0 not in statuses and 85 not in statuses, told
    assert took < 60, f"{took:.0f} s\n{told}"
    errors = [re.findall("^error: .*$", text, re.MULTILINE) for text in told]
    assert [len(lines) for lines in errors] == [1, 1], told  # each side's own: neither hears of the other
    print(f"the nodes ended {took:.1f} s after the cut: {errors}")

    (tmp_path / "again").mkdir()
    again = Pair(nodes, run, tmp_path / "again", "--resume", "auto")
    assert again.statuses(400) == [0, 0], again.told()
    assert "resuming after step" in again.told()[0] + again.told()[1]
    assert run.losses() == undisturbed.losses() and len(run.losses()) == STEPS
    assert run.losses() == pytest.approx(alone.losses(), rel=1e-4)
    expected = undisturbed.adapter
    assert all(torch.equal(tensor, expected[name]) for name, tensor in run.adapter.items())
