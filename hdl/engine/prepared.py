"""Before a weight is read: everything that a run's config describes is opened and checked."""

from dataclasses import dataclass
from typing import Any

import torch

from hdl.adapter.lora import scale_of, shape_of
from hdl.config import Run
from hdl.data.batches import Keeping
from hdl.data.locality import what_thrashes
from hdl.data.mixture import Mixture, open_mixture
from hdl.data.packing import Packs
from hdl.data.picks import Draws
from hdl.data.samples import SampleInfo
from hdl.data.steps import BySamples, ByTokens, Cut
from hdl.data.untriggered import Untriggered, check_phrase, read_prompts
from hdl.engine.budget import settled
from hdl.engine.fast_path import check_stream, may_fuse
from hdl.engine.processes import Processes
from hdl.engine.run_folder import Found, RunFolder
from hdl.engine.sharding import check_optimizer, divides_weights, read_strategy, shares
from hdl.engine.validation import Validation
from hdl.errors import HdlError
from hdl.flow.perceptual import Encoder, read_encoder
from hdl.metrics.metrics import Metrics
from hdl.o1.checkpoint import Checkpoint, open_checkpoint
from hdl.o1.prompt import PromptEncoder
from hdl.o1.visual import tower_bytes


@dataclass(frozen=True)
class Prepared:
    """What is known to be right before a weight is read. run: as it is taken; expected: of its memory, in words."""

    run: Run
    dtype: torch.dtype
    fuses: bool  # may take the fast path, so that its weights need not be loaded yet
    expected: str | None
    folder: RunFolder
    checkpoint: Checkpoint
    mixture: Mixture
    largest: list[SampleInfo]  # that the memory was planned for
    keeping: Keeping | None
    encoder: Encoder | None  # of the perceptual loss
    validation: Validation
    metrics: Metrics
    trained_on: dict[str, str]
    found: Found  # rank 0's: what to continue


def prepare(run: Run, processes: Processes) -> Prepared:
    """Check everything that can be wrong, cheapest first; the run's folder is claimed last.

    Ranks may fail alone here: the caller tells the others.
    """
    micro, _ = shares(run.train, processes.world)
    dtype = _dtype(run, processes)
    read_strategy(run.train.deepspeed)
    check_optimizer(run.train, processes.device, dtype)
    fuses = may_fuse(run, processes.device)
    checkpoint = open_checkpoint(run.model.base, run.model.config_from, run.model.random_init)
    fingerprint = checkpoint.fingerprint()
    mixture = open_mixture(run.data, fingerprint)
    validation = Validation(run, checkpoint, processes)
    untriggered = _untriggered(run, checkpoint, mixture, validation.encoder)
    as_cut = run.train.micro_batch_tokens is not None
    largest = mixture.longest(micro, untriggered.longest_prompt if untriggered and not as_cut else 0)
    beside = tower_bytes(checkpoint, dtype) if mixture.pairs else 0
    encoder = read_encoder(run.flow.perceptual) if run.flow.perceptual else None
    beside += encoder.bytes(dtype, micro) if encoder else 0
    run, expected = settled(
        run, checkpoint.config, largest, processes, fuses and not run.lora.dropout, beside
    )
    check_stream(run, checkpoint.config, dtype)
    metrics = Metrics(run, validation.encoder, mixture, processes)
    trained_on = {
        "base": fingerprint, "variant": run.model.variant, "data": mixture.dataset_hash,
        "adapter shape": shape_of(run.lora), "adapter scale": scale_of(run.lora),
    }  # fmt: skip
    keeping = None
    if untriggered:
        together = divides_weights(run.train) or run.model.shard > 0
        keeping = Keeping(untriggered, run.preserve.weight, together, as_cut)
    folder, found = RunFolder(run.save.output), Found()
    cut_of(run, mixture, micro, {})  # for what can be wrong with it
    if processes.is_main:
        folder.check(run)
        folder.hold()
        folder.check(run)  # nobody else changes it now
        if run.resume != "no":
            found = folder.find(run, trained_on)
        folder.claim(run)
    return Prepared(
        run, dtype, fuses, expected, folder, checkpoint, mixture, largest, keeping, encoder, validation, metrics, trained_on,
        found,
    )  # fmt: skip


def _untriggered(
    run: Run, checkpoint: Checkpoint, mixture: Mixture, encoder: PromptEncoder | None
) -> Untriggered | None:
    """How kept draws are asked for, where there are any. encoder: the base's, if one is there already. HdlError for a
    trigger that nothing answers to, and prompts that cannot be used."""
    trigger, preserve = run.data.trigger, run.preserve
    if trigger is None:
        if preserve.prompts or preserve.regularization:
            raise HdlError(
                "preserve.prompts and preserve.regularization need data.trigger, which they ask without"
            )
        return None
    for phrase in run.data.all_phrases:
        check_phrase(mixture, "data.trigger" if phrase == trigger else "data.phrases", phrase)
    if not run.preserves:
        if preserve.prompts:
            raise HdlError(
                "preserve.prompts: no draw is kept that could ask with them; set preserve.share above 0"
            )
        return None
    prompts = read_prompts(preserve.prompts) if preserve.prompts else []
    encoder = encoder or PromptEncoder(checkpoint)
    untriggered = Untriggered(encoder, run.data.all_phrases, run.train.seed, prompts)
    longest = int(mixture.columns.longest_text().max())
    if run.train.micro_batch_tokens and untriggered.shortest_prompt > longest:
        raise HdlError(
            f"preserve.prompts {preserve.prompts}: every prompt is longer than the longest caption ({longest} tokens), and packs "
            "of train.micro_batch_tokens have no room for them; shorten some, or cut by train.micro_batch_size"
        )
    return untriggered


def cut_of(run: Run, mixture: Mixture, micro: int, state: dict[str, Any]) -> Cut:
    """How the data's stream is cut into steps. state: of the checkpoint that the run goes on from."""
    train, data = run.train, run.data
    draws = Draws(
        mixture, train.seed,
        caption_dropout=run.caption_dropout, mirror=data.mirror, window=data.window, lanes=data.lanes,
        kept_share=run.preserve.share if data.trigger else 0.0,
        keep_regularization=bool(data.trigger) and run.preserve.regularization,
    )  # fmt: skip
    if train.micro_batch_tokens is None or train.batch_packs is None:
        return BySamples(draws, train.batch_size, micro)
    return ByTokens(Packs(draws, train.micro_batch_tokens, state.get("packs")), train.batch_packs)


def announce(prepared: Prepared, processes: Processes, cut: Cut, done: int) -> None:
    """Print what begins. done: steps that the checkpoint it goes on from has behind it."""
    run = prepared.run
    for line in prepared.found.passed_over:
        print(line)
    start = f"resuming after step {done}" if done else "starting"
    print(
        f"{start}: {len(prepared.mixture.columns):,} images, {cut.describe()} on {processes.world} "
        f"process(es) on {processes.device.type}, {str(prepared.dtype).removeprefix('torch.')}, "
        f"{'DoRA' if run.lora.dora else 'LoRA'} rank {run.lora.rank}, {run.train.deepspeed.stem}; curves: tensorboard --logdir {prepared.folder.tensorboard}"
    )
    print(prepared.mixture.describe())
    if prepared.keeping:
        sources = "all of the regularization sources'" if run.preserve.regularization else ""
        shares_kept = [f"{run.preserve.share:.0%} of the draws" if run.preserve.share else "", sources]
        asked = (
            f"prompts of {run.preserve.prompts}"
            if run.preserve.prompts
            else "their captions without the trigger"
        )
        dropped = f"; {run.caption_dropout:.0%} of the captions are left out" if run.caption_dropout else ""
        print(
            f"preserving: {' and '.join(filter(None, shares_kept))} ask with {asked} and are pulled to the base's own "
            f"prediction{dropped}"
        )
    elif run.data.trigger is None:
        print("preserving nothing: data.trigger is not set (hdl/flow/step.py)")
    if prepared.mixture.pairs:
        print(
            f"{prepared.mixture.pairs:,} samples have reference images, for editing: the visual tower is loaded, and "
            "micro-batches with them are not replayed as CUDA graphs"
        )
    if warning := what_thrashes(run.data, prepared.mixture):
        print(warning)
    if prepared.expected:
        print(prepared.expected)


def _dtype(run: Run, processes: Processes) -> torch.dtype:
    if run.model.dtype == "auto":
        return torch.bfloat16 if processes.device.type == "cuda" else torch.float32
    return getattr(torch, run.model.dtype)
