"""The run: from what a config describes (hdl.engine.prepared) to the saved adapter.

The host runs ahead of the GPU: what became of a step is looked at while the next one is computed (see
hdl.engine.step), or before anything is saved or drawn.
"""

import gc
import math
import os
import resource
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed import DeepSpeedEngine

from hdl.adapter.lora import Switch, attach, load_adapter, read_adapter
from hdl.config import Run
from hdl.data.batches import Batches
from hdl.data.reading import Reader
from hdl.data.steps import Steps
from hdl.engine.agreement import check_alike
from hdl.engine.budget import advice
from hdl.engine.checkpoints import AVERAGE_FILE, read_state
from hdl.engine.ema import Average
from hdl.engine.ending import last_duties
from hdl.engine.fast_path import FastPath, check_shard
from hdl.engine.faults import REQUEUE, Signals
from hdl.engine.held_out import HeldOut
from hdl.engine.prepared import Prepared, announce, cut_of, prepare
from hdl.engine.processes import Processes
from hdl.engine.run_folder import Found
from hdl.engine.saving import AVERAGED, Saver, restore
from hdl.engine.sharding import divides_weights, settings_of, shard, shares
from hdl.engine.skipping import Skipping, described, drop_gradient, holds_back, keep_to_schedule
from hdl.engine.step import Measured, TrainStep
from hdl.engine.validation import WITH, WITHOUT, save_picture
from hdl.engine.watch import Watch
from hdl.engine.zero3 import gathered_for_peft, load_partitioned, share_with_dora
from hdl.errors import HdlError
from hdl.flow.noise import VARIANTS
from hdl.flow.perceptual import Perceptual
from hdl.flow.sigma import draw_sigmas, shift_by_size
from hdl.metrics.best import BEST_FILE, Judged, best_text, is_over, read_best
from hdl.metrics.metrics import Report
from hdl.o1.checkpoint import load_model
from hdl.o1.visual import VisualTower
from hdl.report.curves import Reporter, StepReport, means_by_band
from hdl.report.summary import write_summary
from hdl.transfer import Mark, Reading

GIB = 2**30


def train(run: Run, processes: Processes) -> int:
    """Train the adapter; the process's exit status. HdlError for everything a user can mend."""
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")):  # torchrun starts this job again, by itself
        run = run.model_copy(update={"resume": "auto"})
    check_alike(run, processes)
    check_shard(run, processes)
    with Signals() as signals, Watch(processes, run.train.patience) as watch:
        return _train(run, processes, signals, watch)


def _train(run: Run, processes: Processes, signals: Signals, watch: Watch) -> int:
    try:
        prepared, problem = prepare(run, processes), None
    except HdlError as error:
        problem = error
    processes.all_or_none(problem)

    run = prepared.run
    dtype = prepared.dtype
    found: Found = processes.gather(prepared.found)[0]
    if divides_weights(run.train):
        settings = settings_of(run.train, dtype, processes.world)
        model = load_partitioned(prepared.checkpoint, processes.device, dtype, settings)
        with gathered_for_peft(settings):
            adapted = attach(model, run.lora, str(run.model.base), run.train.seed)
        share_with_dora(adapted)
    else:
        model = load_model(prepared.checkpoint, processes.device, dtype, absent=prepared.fuses)
        adapted = attach(model, run.lora, str(run.model.base), run.train.seed)
    tower = VisualTower(prepared.checkpoint, processes.device, dtype) if prepared.mixture.pairs else None
    perceptual = None
    if prepared.encoder:
        perceptual = Perceptual(prepared.encoder, run.flow.perceptual_weight, processes.device, dtype)
    state = read_state(found.newest) if found.newest else {"step": 0, "skipped": 0}
    steps = Steps(
        cut_of(run, prepared.mixture, shares(run.train, processes.world)[0], state), processes.world
    )
    if found.newest:
        weights = read_adapter(adapted, found.newest)  # now: ZeRO-3 leaves no shapes to hold them to
        load_adapter(adapted, found.newest)
    averaged = None
    if run.train.ema and found.newest and AVERAGED in state:
        averaged = read_adapter(adapted, found.newest, AVERAGE_FILE)
    path = FastPath(run, adapted, processes)
    path.prepare()
    engine = shard(adapted, run.train, dtype, processes)
    path.apply()
    if found.newest:
        restore(engine, found.newest, weights, state["step"], state["step"] - state["skipped"])
    average = Average(engine, run.train.ema) if run.train.ema else None
    if average and averaged:
        average.restore(averaged, state[AVERAGED])
    saver = Saver(
        engine, processes, prepared.folder, run.save, prepared.trained_on, found,
        trigger=run.data.trigger, average=average,
    )  # fmt: skip
    if processes.is_main:
        announce(prepared, processes, steps.cut, state["step"])
        if found.newest and bool(average) != (AVERAGED in state):
            print(_without_average(run.train.ema, found.newest))
    loop = Loop(
        run, prepared, processes, engine, steps, state,
        dtype=dtype, path=path, saver=saver, signals=signals, watch=watch, average=average, tower=tower,
        perceptual=perceptual,
    )  # fmt: skip
    try:
        status = loop.go()
        engine.destroy()  # its hooks would keep the model in memory, for as long as the process lasts
        return status
    finally:
        prepared.folder.release()


@dataclass(frozen=True)
class Taken:
    """A step whose outcome is not known yet: the optimizer is queued, and the gradient's norm on its way."""

    number: int  # the first step is 1
    measured: Measured
    grad_norm: Reading
    lr: float
    start: Mark
    peak_memory: float
    images: int
    waited: float
    waste: float | None
    samples: list[tuple[str, float]]  # this rank's, with their sigmas


class Loop:
    """The steps themselves, with what happens between them."""

    def __init__(
        self, run: Run, prepared: Prepared, processes: Processes, engine: DeepSpeedEngine, steps: Steps,
        state: dict[str, Any], *, dtype: torch.dtype, path: FastPath, saver: Saver, signals: Signals, watch: Watch,
        average: Average | None = None, tower: VisualTower | None = None, perceptual: Perceptual | None = None,
    ) -> None:  # fmt: skip
        """state: of the checkpoint that the run goes on from. average: with train.ema. tower: where the data have
        pairs. perceptual: where the loss has that part."""
        self.run, self.prepared, self.processes, self.engine = run, prepared, processes, engine
        self.done = self.first = done = state["step"]  # steps so far, skipped ones included
        self.saver, self.signals, self.watch, self.average = saver, signals, watch, average
        self.stalled: tuple[int, Mark, Mark] | None = (
            None  # by a save: after which step, from when, until when
        )
        self.skipping = Skipping(run.train, prepared.folder.skipped if processes.is_main else None, state)
        self.path, self.eased = path, False
        self.train_step = TrainStep(
            engine, processes,
            variant=VARIANTS[run.model.variant], flow=run.flow, seed=run.train.seed, dropout=run.lora.dropout,
            dtype=dtype, fused=path.fused, ease=self._ease, concern=self._concern, tower=tower, lockstep=path.lockstep,
            base=Switch(engine.module).off, perceptual=perceptual,
        )  # fmt: skip
        self.dtype = dtype
        self.best: Judged | None = processes.gather(read_best(prepared.folder.best))[0]
        self.taken: Taken | None = None
        self.start = Mark(processes.device)  # of the next step
        self.steps = steps
        reader = Reader(prepared.mixture, run.train.seed, run.data.max_lost, processes.rank)
        eyes, pin = tower.eyes if tower else None, processes.device.type == "cuda"
        self.batches = Batches(
            self.steps, reader, processes.rank, pin_memory=pin, eyes=eyes, keeping=prepared.keeping
        )
        self.held_out = HeldOut(run, prepared.mixture, processes, dtype, path.fused, tower)
        self.reporter = (
            Reporter(prepared.folder.tensorboard, done, run.train.steps) if processes.is_main else None
        )

    def go(self) -> int:
        """The process's exit status: 0 after the last step, REQUEUE when the run was asked to stop before."""
        run, steps = self.run, self.run.train.steps
        last_duties[:] = [self.saver.join, *([self.reporter.flush] if self.reporter else [])]
        self.signals.stepping = True
        self.engine.train()  # dropout on; drawing pictures switches it off and on again
        try:
            if self.done == 0 or (self._is_due(run.validation.every) and not self._is_validated()):
                self._validate()  # which a run that was stopped after its checkpoint has not come to
            while self.done < steps and not self._is_over():
                concerned = self._step()
                last = self.done == steps
                asked = self._attend() if concerned else None
                if asked and not last:
                    return self._stop_as_asked(asked)
                if self._is_due(run.save.every):
                    self._save()
                if self._is_due(run.validation.every):
                    self._validate()
            self._save()  # where the run is over before its last step
            self.saver.finish()
            self._install_adapter()
            self._tell_what_was_drawn()
            self._summarize()
            return 0
        except (HdlError, KeyboardInterrupt):
            self._settle()  # the curves end with the last step that was taken
            raise
        finally:
            self.batches.close()
            self.saver.close()
            if self.reporter:
                self.reporter.close()

    def _is_due(self, every: int) -> bool:
        return self.done == self.run.train.steps or self.done % every == 0

    def _step(self) -> bool:
        """Whether a rank wants the run to be looked at before the next step."""
        step, train, flow = self.done, self.run.train, self.run.flow
        batches = self.batches.of_step(step)
        plan = self.steps.plan(step)
        sigmas = draw_sigmas(
            plan.samples, train.seed, step,
            distribution=flow.sigma, mean=flow.logit_mean, std=flow.logit_std,
            shift=shift_by_size(flow.shift, flow.shift_area, plan.patches_of_each),
        )  # fmt: skip
        lr = self.engine.get_lr()[0]  # of this step
        samples = [(k, float(sigmas[p])) for batch in batches for k, p in zip(batch.keys, batch.places)]
        if step >= self.first + 2:  # the first ones compile, each rank at its own pace
            self.watch.at(step)
        reading = self.train_step.forward_backward(step, batches, sigmas)
        self._settle()
        measured = Measured.read(reading)
        if why := self.skipping.objection(measured.loss):
            self._skip(step + 1, f"the loss of step {step + 1} {why}", samples)
            drop_gradient(self.engine)
            self.done += 1
            self.start = Mark(self.processes.device)
        else:
            grad_norm = self.train_step.update()
            keep_to_schedule(self.engine)
            self.done += 1
            peak = _peak_memory(self.processes.device)
            waste = None
            if train.micro_batch_tokens:
                waste = 1 - plan.tokens / (len(plan.packs) * train.micro_batch_tokens)
            self.taken = Taken(
                self.done, measured, grad_norm, lr, self.start, peak, plan.samples, self.batches.waited, waste,
                samples,
            )  # fmt: skip
            self.start = grad_norm.mark
        return measured.concerned > 0

    def _concern(self) -> bool:
        return self.signals.asked is not None or self.saver.problem() is not None

    def _attend(self) -> str | None:
        """The signal that asked a rank to stop; HdlError on every rank when a checkpoint could not be written."""
        self.processes.all_or_none(self.saver.problem())
        return next((signal for signal in self.processes.gather(self.signals.asked) if signal), None)

    def _stop_as_asked(self, signal: str) -> int:
        path = self._save()
        self.saver.finish()
        if self.reporter:
            self.prepared.folder.ask_for_requeue(signal, self.done)
            self.reporter.say(
                f"{signal}: stopped after step {self.done}, saved in {path}; --resume auto goes on"
            )
        return REQUEUE

    def _skip(self, step: int, what: str, samples: list[tuple[str, float]]) -> None:
        """Report a step that is not taken; HdlError when there have been too many. samples: this rank's."""
        everyone = [sample for part in self.processes.gather(samples) for sample in part]
        if not self.skipping.may():
            saved = self._save()
            self.saver.finish()
            raise HdlError(
                f"{what}; the state before it is kept in {saved}. Its samples: {described(everyone)}. "
                f"{self.skipping.count} steps have been skipped so far ({self.prepared.folder.skipped}). Look at these "
                f"images, or resume with a lower train.lr, or with train.max_skipped above {self.run.train.max_skipped}",
                on_all_ranks=True,
            )
        self.skipping.record(step, what, everyone)
        if self.reporter:
            line = f"skipped a step: {what}. Its samples: {described(everyone)}"
            self.reporter.skipped(step, self.skipping.count, line)

    def _ease(self, lacking: str, again: bool) -> None:
        """After a micro-batch that ran out of memory: recompute more, once. HdlError the second time, and where it cannot
        be taken again."""
        step, said = self.done + 1, lacking.split(". ")[:2]
        if not again or self.eased or not self.path.ease():
            prepared = self.prepared
            config = prepared.checkpoint.config
            raise HdlError(
                f"step {step} ran out of memory ({'. '.join(said)}); what is saved in {prepared.folder.checkpoints} is "
                f"good. To go on from there, {advice(self.run, config, prepared.largest, self.processes)}"
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
        """See how the last step ended, take it into the average and report it; HdlError when its gradient was not
        finite."""
        stalled, self.stalled = self.stalled, None
        if stalled and self.reporter:
            step, before, after = stalled
            after.wait()
            self.reporter.saved(step, after.seconds_since(before))
        taken, self.taken = self.taken, None
        if not taken:
            return
        grad_norm = float(taken.grad_norm.wait())
        if not math.isfinite(grad_norm):
            what = f"the gradient of step {taken.number} is not finite, though its loss is ({taken.measured.loss:.4g})"
            if not (self.skipping.may() and holds_back(self.engine)):
                raise HdlError(
                    f"{what}; nothing was saved after it. Resume from the last checkpoint in "
                    f"{self.prepared.folder.checkpoints} with a lower train.lr",
                    on_all_ranks=True,
                )
            self._skip(taken.number, what, taken.samples)
            return
        if self.average:
            self.average.update()  # the weights are still this step's
        if self.reporter:
            self.reporter.step(taken.number, self._report(taken, grad_norm))

    def _report(self, taken: Taken, grad_norm: float) -> StepReport:
        return StepReport(
            loss=taken.measured.loss,
            bands=taken.measured.bands,
            grad_norm=grad_norm,
            lr=taken.lr,
            images=taken.images,
            tokens=taken.measured.tokens,
            seconds=taken.grad_norm.mark.seconds_since(taken.start),
            peak_memory=taken.peak_memory,
            waited=taken.waited,
            waste=taken.waste,
            kept=taken.measured.kept,
        )

    def _save(self) -> str:
        """Begin to write a checkpoint, unless there is one of this step; where it will be."""
        self._settle()
        if self.reporter:
            shares_drawn = self.batches.tally.shares()
            self.reporter.scalars(self.done, {f"data/share/{name}": s for name, s in shares_drawn.items()})
            self.reporter.flush()  # a checkpoint is never ahead of its curves
        with self.watch.excused():  # rank 0's disk may still be at the one before
            before = Mark(self.processes.device)
            say = self.reporter.say if self.reporter else None
            state = self.skipping.state() | {"packs": self.steps.cut.state(self.done)}
            after = self.saver.save(self.done, state, say)
        if after:
            self.stalled = self.done, before, after
        self.start = Mark(self.processes.device)  # this took no step's time
        return str(self.saver.path(self.done))

    def _install_adapter(self) -> None:
        problem = None
        if self.reporter:
            self._settle()  # the last save's time
            try:
                self.saver.install_adapter(self.prepared.folder.adapter)
                self.reporter.say(f"adapter: {self.prepared.folder.adapter}")
                if self.saver.newest and (self.saver.newest / AVERAGE_FILE).exists():
                    self.saver.install_adapter(self.prepared.folder.average, AVERAGE_FILE)
                    self.reporter.say(f"its average over the steps: {self.prepared.folder.average}")
            except HdlError as error:
                problem = error
        self.processes.all_or_none(problem)

    def _tell_what_was_drawn(self) -> None:
        lost: dict[str, str] = {}
        for of_rank in self.processes.gather(self.batches.reader.lost):
            lost |= of_rank
        if self.reporter:
            for line in (
                self.batches.tally.describe(),
                *(f"lost: {name}: {why}" for name, why in lost.items()),
            ):
                if line:
                    self.reporter.say(line)

    def _summarize(self) -> None:
        """Write the run's page. Everything is saved by now: whatever is wrong with it costs a line, not the run."""
        if not self.reporter:
            return
        self.reporter.flush()
        with self.watch.excused():
            try:
                self.reporter.say(f"summary: {write_summary(self.prepared.folder.path)}")
            except Exception as error:
                self.reporter.say(f"no summary was written: {error or repr(error)}")

    def _validate(self) -> None:
        self._measure_held_out()
        self._draw_pictures()
        if self.reporter:
            self.prepared.folder.remember_validation(self.done)

    def _is_validated(self) -> bool:
        """Whether this step was, by the run that is continued."""
        return bool(self.processes.gather(self.prepared.folder.last_validation())[0] >= self.done)

    def _measure_held_out(self) -> None:
        if not self.held_out.count:
            return
        self._settle()
        measured = {"held_out": self.held_out.measure(self.engine.module)}
        if self.average:
            with self.average.in_the_model():
                measured["held_out_ema"] = self.held_out.measure(self.engine.module)
        if self.reporter:
            for name, of in measured.items():
                self.reporter.scalars(self.done, {f"{name}/loss": of.loss} | means_by_band(name, of.bands))
        self.start = Mark(self.processes.device)

    def _draw_pictures(self) -> None:
        if not self.prepared.validation.prompts:
            return
        self._settle()
        validation = self.prepared.validation
        drawn = validation.draw(self.engine.module, self.average)
        if self.reporter:
            grid = validation.grid(drawn)
            path = save_picture(grid, self.prepared.folder.pictures, self.done)
            self.reporter.picture(self.done, grid)
            self.reporter.say(f"pictures after {self.done} steps: {path}")
        self._judge(drawn[WITHOUT], drawn[WITH])
        self.start = Mark(self.processes.device)

    def _judge(self, without: list[torch.Tensor], with_adapter: list[torch.Tensor]) -> None:
        """Report what is measured on predictions and pictures, and keep the adapter if it is the best so far."""
        report, problem = Report(), None
        with self.watch.excused():  # rank 0 looks at the pictures
            try:
                model = self.engine.module
                report = self.prepared.metrics.report(model, self.done, without, with_adapter, self.dtype)
            except HdlError as error:
                problem = error
            self.processes.all_or_none(problem)
        if self.reporter:
            self.reporter.scalars(self.done, report.curves)
        judged: Judged | None = self.processes.gather(report.judged)[0]
        if judged and self.done and (self.best is None or judged.score > self.best.score):
            self._keep_best(judged)

    def _keep_best(self, judged: Judged) -> None:
        """Save this step, whether it is its turn or not, and copy its adapter."""
        self.best = judged
        self._save()
        self.saver.finish()
        problem = None
        if self.reporter:
            folder = self.prepared.folder.best
            try:
                self.saver.install_adapter(folder, texts={BEST_FILE: best_text(judged)})
                self.reporter.say(
                    f"the best adapter so far: {folder}, gate {judged.gate:.3f}, relative drift {judged.drift:.3f}"
                )
            except HdlError as error:
                problem = error
        self.processes.all_or_none(problem)

    def _is_over(self) -> bool:
        """Whether validations have stopped getting better; told once."""
        validation = self.run.validation
        over = is_over(self.best, self.done, validation.every, validation.stop_after)
        if over and self.reporter and self.best:
            self.reporter.say(
                f"stopped after step {self.done}: no better score than {self.best.score:.3f} since step {self.best.step} "
                f"(validation.stop_after {validation.stop_after})"
            )
        return over


def _peak_memory(device: torch.device) -> float:
    """GiB: reserved on the GPU by PyTorch's allocator, which has what CUDA graphs hold between steps too, or the
    process's largest resident size on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_reserved() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB


def _without_average(decay: float, checkpoint: Path) -> str:
    """Of a run that goes on from a checkpoint with an average and keeps none, or the other way round."""
    if decay:
        return f"train.ema {decay:g}: {checkpoint} holds no average, so it starts from the weights there, and its decay at 0"
    return f"train.ema 0: the average in {checkpoint} is not gone on with; set train.ema to keep it"
