"""The run: everything that train.py's config describes, from checks to the saved adapter.

The host runs ahead of the GPU: what became of a step is looked at while the next one is computed (see
hdl.engine.step), or before anything is saved or drawn.
"""

import gc
import math
import resource
from dataclasses import dataclass

import torch
from deepspeed import DeepSpeedEngine
from torch import Tensor

from hdl.adapter.lora import attach, load_adapter, save_adapter
from hdl.config import Run
from hdl.data.batches import Batch, Batches
from hdl.data.shards import Shards
from hdl.engine.budget import advice, settled
from hdl.engine.checkpoints import adapter_weights, read_state, restore, save_checkpoint
from hdl.engine.fast_path import FastPath, check_stream, may_fuse
from hdl.engine.processes import Processes
from hdl.engine.run_folder import RunFolder
from hdl.engine.sharding import check_optimizer, read_strategy, shard, shares
from hdl.engine.step import Measured, TrainStep
from hdl.engine.validation import Validation, save_picture
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.flow.sigma import draw_sigmas
from hdl.o1.checkpoint import Checkpoint, load_model, open_checkpoint
from hdl.report.curves import Reporter, StepReport
from hdl.transfer import Mark, Reading

GIB = 2**30


@dataclass(frozen=True)
class Prepared:
    """What is known to be right before a weight is read. run: as it is taken; expected: of its memory, in words."""

    run: Run
    fuses: bool  # may take the fast path, so that its weights need not be loaded yet
    expected: str | None
    folder: RunFolder
    checkpoint: Checkpoint
    shards: Shards
    validation: Validation
    trained_on: dict[str, str]


def prepare(run: Run, processes: Processes) -> Prepared:
    """Check everything that can be wrong, cheapest first; the run's folder is claimed last.

    Ranks may fail alone here: the caller tells the others.
    """
    shares(run.train, processes.world)
    read_strategy(run.train.deepspeed)
    check_optimizer(run.train, processes.device, _dtype(run, processes))
    fuses = may_fuse(run, processes.device)
    checkpoint = open_checkpoint(run.model.base, run.model.config_from, run.model.random_init)
    fingerprint = checkpoint.fingerprint()
    shards = Shards(run.data.shards, fingerprint)
    run, expected = settled(run, checkpoint.config, shards.infos, processes, fuses and not run.lora.dropout)
    check_stream(run, checkpoint.config, _dtype(run, processes))
    validation = Validation(run, checkpoint, processes)
    trained_on = {"base": fingerprint, "data": shards.dataset_hash}
    folder = RunFolder(run.save.output)
    if processes.is_main:
        folder.check(run)
        if run.resume:
            _check_same_run(read_state(folder.to_resume()), trained_on, folder)
        folder.claim(run)
    return Prepared(run, fuses, expected, folder, checkpoint, shards, validation, trained_on)


def _check_same_run(state: dict[str, str], trained_on: dict[str, str], folder: RunFolder) -> None:
    for what, now in trained_on.items():
        if state.get(what) != now:
            raise HdlError(
                f"{folder.path} was trained on another {what} ({state.get(what)}) than this config's ({now}); "
                "resume it with its own config.toml, or start in another folder"
            )


def train(run: Run, processes: Processes) -> None:
    """Train the adapter; HdlError for everything a user can mend."""
    try:
        prepared, problem = prepare(run, processes), None
    except HdlError as error:
        problem = error
    processes.all_or_none(problem)

    run = prepared.run
    dtype = _dtype(run, processes)
    model = load_model(prepared.checkpoint, processes.device, dtype, absent=prepared.fuses)
    adapted = attach(model, run.lora, str(run.model.base), run.train.seed)
    done = 0
    if run.resume:
        newest = prepared.folder.to_resume()
        done = read_state(newest)["step"]
        load_adapter(adapted, newest)
    path = FastPath(run, adapted, processes)
    path.prepare()
    engine = shard(adapted, run.train, dtype, processes)
    path.apply()
    if run.resume:
        restore(engine, newest, done)
    if processes.is_main:
        _announce(run, prepared, processes, dtype, done)
    Loop(run, prepared, processes, engine, done, dtype=dtype, path=path).go()


@dataclass(frozen=True)
class Taken:
    """A step whose outcome is not known yet: the optimizer is queued, and the gradient's norm on its way."""

    number: int  # the first step is 1
    measured: Measured
    grad_norm: Reading
    lr: float
    start: Mark
    peak_memory: float


class Loop:
    """The steps themselves, with what happens between them."""

    def __init__(
        self, run: Run, prepared: Prepared, processes: Processes, engine: DeepSpeedEngine, done: int,
        *, dtype: torch.dtype, path: FastPath,
    ) -> None:  # fmt: skip
        self.run, self.prepared, self.processes, self.engine = run, prepared, processes, engine
        self.done = done  # optimizer steps taken so far
        self.path, self.eased = path, False
        self.train_step = TrainStep(
            engine, processes,
            variant=VARIANTS[run.model.variant], flow=run.flow, seed=run.train.seed, dropout=run.lora.dropout,
            dtype=dtype, fused=path.fused, ease=self._ease,
        )  # fmt: skip
        self.taken: Taken | None = None
        self.start = Mark(processes.device)  # of the next step
        micro, _ = shares(run.train, processes.world)
        self.batches = Batches(
            prepared.shards,
            batch_size=run.train.batch_size,
            micro_batch_size=micro,
            rank=processes.rank,
            world=processes.world,
            seed=run.train.seed,
            caption_dropout=run.data.caption_dropout,
            pin_memory=processes.device.type == "cuda",
        )
        self.reporter = (
            Reporter(prepared.folder.tensorboard, done, run.train.steps) if processes.is_main else None
        )

    def go(self) -> None:
        run, steps = self.run, self.run.train.steps
        self.engine.train()  # dropout on; drawing pictures switches it off and on again
        try:
            if self.done == 0:
                self._draw_pictures()
            while self.done < steps:
                self._step()
                last = self.done == steps
                if last or self.done % run.save.every == 0:
                    self._save()
                if last or self.done % run.validation.every == 0:
                    self._draw_pictures()
            self._save_adapter()
        except (HdlError, KeyboardInterrupt):
            self._settle()  # the curves end with the last step that was taken
            raise
        finally:
            self.batches.close()
            if self.reporter:
                self.reporter.close()

    def _step(self) -> None:
        step, train, flow = self.done, self.run.train, self.run.flow
        sigmas = draw_sigmas(
            train.batch_size, train.seed, step,
            distribution=flow.sigma, mean=flow.logit_mean, std=flow.logit_std, shift=flow.shift,
        )  # fmt: skip
        lr = self.engine.get_lr()[0]  # of this step
        batches = self.batches.of_step(step)
        reading = self.train_step.forward_backward(step, batches, sigmas)
        self._settle()
        measured = Measured.read(reading)
        if not math.isfinite(measured.loss):
            self._stop_at_nan(batches, sigmas)
        grad_norm = self.train_step.update()
        self.done += 1
        peak = _peak_memory(self.processes.device)
        self.taken = Taken(self.done, measured, grad_norm, lr, self.start, peak)
        self.start = grad_norm.mark

    def _ease(self, lacking: str) -> None:
        """After a micro-batch that ran out of memory: recompute more, once. HdlError the second time."""
        step, said = self.done + 1, lacking.split(". ")[:2]
        if self.eased or not self.path.ease():
            prepared = self.prepared
            config, infos = prepared.checkpoint.config, prepared.shards.infos
            raise HdlError(
                f"step {step} ran out of memory ({'. '.join(said)}); what is saved in {prepared.folder.checkpoints} is "
                f"good. To go on from there, {advice(self.run, config, infos, self.processes)}"
            )
        self.eased = True
        gc.collect()
        if self.processes.device.type == "cuda":
            torch.cuda.empty_cache()
        print(
            f"rank {self.processes.rank}, step {step}: out of memory ({'. '.join(said)}); taken again with more "
            "recomputation, which stays on from now on",
            flush=True,
        )

    def _settle(self) -> None:
        """See how the last step ended, and report it; HdlError when its gradient was not finite."""
        taken, self.taken = self.taken, None
        if not taken:
            return
        grad_norm = float(taken.grad_norm.wait())
        if not math.isfinite(grad_norm):
            raise HdlError(
                f"the gradient of step {taken.number} is not finite, though its loss is ({taken.measured.loss:.4g}); "
                f"nothing was saved after it. Resume from the last checkpoint in {self.prepared.folder.checkpoints} "
                "with a lower train.lr",
                on_all_ranks=True,
            )
        if self.reporter:
            self.reporter.step(taken.number, self._report(taken, grad_norm))

    def _report(self, taken: Taken, grad_norm: float) -> StepReport:
        return StepReport(
            loss=taken.measured.loss,
            bands=taken.measured.bands,
            grad_norm=grad_norm,
            lr=taken.lr,
            images=self.run.train.batch_size,
            tokens=taken.measured.tokens,
            seconds=taken.grad_norm.mark.seconds_since(taken.start),
            peak_memory=taken.peak_memory,
        )

    def _stop_at_nan(self, batches: list[Batch], sigmas: Tensor) -> None:
        """The step's gradients are thrown away: what is saved is the state before it."""
        saved = self._save()
        places = [place for batch in batches for place in batch.places]
        keys = [key for batch in batches for key in batch.keys]
        everyone = self.processes.gather(
            [f"{k} at sigma {float(sigmas[p]):.4f}" for k, p in zip(keys, places)]
        )
        samples = ", ".join(text for texts in everyone for text in texts)
        raise HdlError(
            f"the loss of step {self.done + 1} is not finite; the state before it is kept in {saved}. Its samples: "
            f"{samples}. Look at these images, or resume with a lower train.lr",
            on_all_ranks=True,
        )

    def _save(self) -> str:
        self._settle()
        path = save_checkpoint(
            self.engine, self.prepared.folder.checkpoints, self.done, self.prepared.trained_on, self.processes
        )
        if self.reporter:
            self.reporter.say(f"saved {path}")
            self.reporter.flush()
        self.start = Mark(self.processes.device)  # this took no step's time
        return str(path)

    def _save_adapter(self) -> None:
        weights = adapter_weights(self.engine)
        if self.reporter:
            save_adapter(self.engine.module, weights, self.prepared.folder.adapter)
            self.reporter.say(f"adapter: {self.prepared.folder.adapter}")

    def _draw_pictures(self) -> None:
        if not self.prepared.validation.prompts:
            return
        self._settle()
        grid = self.prepared.validation.draw(self.engine.module)
        if self.reporter:
            path = save_picture(grid, self.prepared.folder.pictures, self.done)
            self.reporter.picture(self.done, grid)
            self.reporter.say(f"pictures after {self.done} steps: {path}")
        self.start = Mark(self.processes.device)


def _peak_memory(device: torch.device) -> float:
    """GiB: allocated on the GPU, or the process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _dtype(run: Run, processes: Processes) -> torch.dtype:
    if run.model.dtype == "auto":
        return torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    return getattr(torch, run.model.dtype)


def _announce(run: Run, prepared: Prepared, processes: Processes, dtype: torch.dtype, done: int) -> None:
    start = f"resuming after step {done}" if done else "starting"
    print(
        f"{start}: {len(prepared.shards.infos)} images, {run.train.batch_size} a step on {processes.world} "
        f"process(es) on {processes.device.type}, {str(dtype).removeprefix('torch.')}, LoRA rank {run.lora.rank}, "
        f"{run.train.deepspeed.stem}; curves: tensorboard --logdir {prepared.folder.tensorboard}"
    )
    if prepared.expected:
        print(prepared.expected)
