"""A step that runs out of memory is taken again with more recomputation, once. The allocator's error is made up."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

REPOSITORY = Path(__file__).parents[2]
# Trains three times (four layers, two micro-batches a step): undisturbed; with the second micro-batch of the second
# step failing in its third layer's backward pass, once; and always.
SCRIPT = """
import sys
from itertools import count
from pathlib import Path
import torch
from hdl.engine.processes import process_group

out, base, shards = Path(sys.argv[1]), *sys.argv[2:4]
with process_group() as processes:
    import hdl.kernels.layer as layer
    from hdl.config import load_run
    from hdl.engine.loop import train
    from hdl.errors import HdlError
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    plain = layer.backward
    deliver = DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads

    def failing(function, fails, wanted):
        # Where its calls, counted from 1, are among `fails`, it finds no memory.
        numbers = count(1)

        def call(*arguments):
            if next(numbers) in fails:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {wanted} GiB.")
            return function(*arguments)

        return call

    for name, passes, deliveries in (
        ("undisturbed", (), ()), ("once", (15,), ()), ("always", range(15, 1000), ()), ("late", (), (3,)),
    ):
        layer.backward = failing(plain, passes, "1.00")
        DeepSpeedZeroOptimizer.reduce_ready_partitions_and_remove_grads = failing(deliver, deliveries, "2.00")
        run = load_run([
            *("--model.base", base, "--data.shards", shards, "--save.output", str(out / name)),
            *("--model.kernels", "fused", "--train.steps", "4", "--train.batch_size", "4", "--lora.rank", "4"),
            *("--train.micro_batch_size", "2", "--train.warmup_steps", "1", "--train.lr", "1e-3"),
        ])
        try:
            train(run, processes)
            print("ended", name)
        except HdlError as error:
            print("stopped", name, error)
"""


def test_a_step_is_taken_again_once(tmp_path: Path, tiny_base: Path, shards: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    ran = subprocess.run(
        [sys.executable, str(script), str(tmp_path / "runs"), str(tiny_base), str(shards)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=300,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"},
    )  # fmt: skip
    assert ran.returncode == 0, ran.stderr[-3000:]
    assert "ended undisturbed" in ran.stdout and "ended once" in ran.stdout
    assert "stopped always" in ran.stdout
    stopped, late = ran.stdout.split("stopped always")[1].split("stopped late")
    assert "step 2 ran out of memory" in late and "Tried to allocate 2.00 GiB" in late, (
        "DeepSpeed had the gradient"
    )
    assert "step 2 ran out of memory" in stopped and "Tried to allocate 1.00 GiB" in stopped
    assert ran.stdout.count("taken again with more recomputation") == 2
    undisturbed, once = (losses(tmp_path / "runs" / name) for name in ("undisturbed", "once"))
    assert len(undisturbed) == 4 and once == pytest.approx(undisturbed, rel=1e-6)


def losses(run: Path) -> list[float]:
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    return [event.value for event in events.Scalars("loss")]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the allocator of a GPU")
@pytest.mark.parametrize("given", [None, "expandable_segments:False"])
def test_segments_expand_unless_the_user_says_otherwise(given: str | None) -> None:
    script = (
        "import torch\nfrom hdl.engine.processes import process_group\n"
        "with process_group() as processes:\n"
        "    some = torch.empty(1 << 25, device=processes.device)\n"
        "    print([segment['is_expandable'] for segment in torch.cuda.memory_snapshot()])\n"
    )
    environment = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    environment |= {"PYTORCH_ALLOC_CONF": given} if given else {}
    ran = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True)
    assert ran.stdout.splitlines()[-1:] == [str([given is None])], ran.stderr
