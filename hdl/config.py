"""A run, described: every option there is, with its unit, default and bounds.

One TOML file describes a run, or several, such as the run's own and a preset for the machine; any field can be
set on the command line on top of them:

    train.py RUN.toml launch/presets/24gb.toml --lora.rank 16 --train.steps 500

Unknown keys, wrong types and combinations that cannot work are refused before anything is loaded, each
named with what was expected.
"""

import argparse
import json
import re
from itertools import takewhile
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, NoReturn, Union, get_args, get_origin

import tomli_w
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

from hdl.errors import HdlError
from hdl.o1.patches import PATCH
from hdl.toml import did_you_mean, read_toml

# The seven linears of every decoder layer; a regular expression over module names, as PEFT takes it.
DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


Keep = Literal["everything", "products", "attention", "input"]


class Section(BaseModel):
    model_config = ConfigDict(
        extra="forbid", validate_default=True, use_attribute_docstrings=True, allow_inf_nan=False
    )


class Model(Section):
    base: Path
    """Checkpoint: the published folder, or ComfyUI's single .safetensors file."""
    config_from: Path | None = None
    """Folder with config.json and tokenizer, when they are not beside the weights."""
    random_init: bool = False
    """Draw random weights of the config's shapes instead of reading any (for measuring speed)."""
    variant: Literal["full", "dev"] = "full"
    """Which published variant the base is; sets noise scale, clipping and sampler."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Of the frozen weights and the arithmetic; auto: bfloat16 on a GPU, float32 on a CPU."""
    kernels: Literal["auto", "fused", "plain"] = "auto"
    """Path of the decoder: fused kernels, or PEFT's own modules; auto: fused where a GPU allows it."""
    weights: Literal["full", "fp8", "fp8_once", "nf4"] = "full"
    """Form of the decoder's frozen weights. full: `dtype`; fp8: e4m3, multiplied in as it is (Ada and newer),
    kept twice for speed; fp8_once: kept once, half the memory of full; nf4: 4 bits, a quarter (needs a GPU)."""
    stream: int = Field(0, ge=0)
    """Decoder layers whose frozen weights stay in host memory, once a machine, and come to the GPU when needed;
    two of them are always there, so that n streamed layers save the memory of n - 2. Any form of weights."""
    shard: int = Field(0, ge=0)
    """Decoder layers whose frozen weights are shared out over the GPUs of a machine, an equal part on each, and brought
    together when needed; two are always whole, so that n sharded layers on g GPUs save the memory of n - 2 - n/g."""
    cache: Path | None = None
    """Folder where the decoder's e4m3 or nf4 weights are kept as they were made from the base, once for every base
    and form: the first start writes them, the next ones read them instead of the base's."""
    keep: Keep | list[Keep] = "everything"
    """What backward finds ready, for all layers or one word a layer; the rest is recomputed. products:
    outputs of large products and of attention; attention: of attention; input: each layer's input."""
    offload: int = Field(0, ge=0)
    """Decoder layers of which `keep` waits in host memory for backward, copied while others compute, on a GPU; two of
    them stay, so that n offloaded layers save the memory of n - 2: at least 3, or 0."""
    memory: Literal["set", "auto"] = "set"
    """On a GPU. set: weights, stream, keep, offload and the optimizer are as set here; auto: as the fastest plan has
    them that fits the GPU and the host (tools/plan.py)."""
    card: float | None = Field(None, gt=1)
    """GiB of the card to plan for and stay within, less 1 GiB for others; unset: all of the GPU's."""

    @model_validator(mode="after")
    def _does_something(self) -> "Model":
        if 0 < self.offload < 3:
            raise ValueError(f"offload {self.offload}: two layers always stay; offload 0 or at least 3")
        if self.shard and (self.stream or self.offload):
            other = "stream" if self.stream else "offload"
            raise ValueError(
                f"shard {self.shard} and {other} {getattr(self, other)} cannot be combined; leave one of them out"
            )
        if self.shard and self.memory == "auto":
            raise ValueError(
                f"memory auto plans for one GPU, without shard {self.shard}; use memory set with it"
            )
        if self.cache and self.random_init:
            raise ValueError(
                "cache keeps what was made from a base's weights, and random_init draws its own each time; leave "
                "one of them out"
            )
        if self.cache and self.weights == "full" and self.memory == "set":
            raise ValueError(
                "cache is of no use with weights full, which are read as they are; leave it out, or use weights "
                "fp8, fp8_once or nf4"
            )
        return self


def _multiplier(value: Any) -> Any:
    return value.removesuffix("x") if isinstance(value, str) else value


Multiplier = Annotated[float, BeforeValidator(_multiplier), Field(ge=0)]  # 0.3 or "2x"


class Source(Section):
    shards: str
    """What tools/prepare.py wrote with this base: a folder, a URL, or "pipe:COMMAND with {file}"."""
    repeats: float = Field(1.0, ge=0)
    """Draws of each sample in an epoch, before tags."""
    weight: float | None = Field(None, ge=0)
    """Share of all draws, to the other sources' weights; of all sources or of none."""
    regularization: bool = False
    """Images of the general kind: their loss has the factor data.regularization_weight, none is held out."""
    tags: dict[str, Multiplier] = {}
    """Multipliers by tag or style within this source, beside data.tags."""


class Data(Section):
    required: ClassVar = "data.shards (or several data.sources.NAME.shards)"

    shards: str | None = None
    """What tools/prepare.py wrote with this base: a folder, a URL, or "pipe:COMMAND with {file}"."""
    sources: dict[str, Source] = {}
    """Several, by name; exactly how they are mixed: hdl/data/mixture.py."""
    tags: dict[str, Multiplier] = {}
    """Multipliers by tag or style: nsfw = 0.3, anime = "2x"; 0 leaves its samples out."""
    regularization_weight: float = Field(1.0, ge=0)
    """Factor of the loss of regularization sources' samples."""
    held_out: float = Field(0.0, ge=0, lt=1)
    """Share of images kept for validation.held_out_samples, chosen by the hash of the image."""
    cache: Path | None = None
    """Folder for shards fetched from elsewhere, on a disk of this machine; unset: in the user's cache folder."""
    cache_gib: float = Field(20.0, gt=0)
    """What it may hold."""
    storage: dict[str, Any] = {}
    """Options for fsspec's file system, where shards are at a URL."""
    window: int | None = Field(None, ge=1)
    """Shards that are mixed at a time, for shards that are fetched from elsewhere; unset: all."""
    lanes: int = Field(1, ge=1)
    """Parts of an epoch that are read side by side, so that a node needs its own part's shards only: the number
    of nodes, where shards are fetched from elsewhere."""
    max_lost: float = Field(0.02, ge=0, le=1)
    """Share of samples whose shards may be lost before the run stops; others of their size take their places."""
    mirror: bool = False
    """Mirror half of the samples that were prepared as having no right way round."""
    caption_dropout: float | None = Field(None, ge=0, le=1)
    """Share of samples trained with the empty prompt. Unset: 0.1, and none where `preserve` is at work: a picture that
    is shown without its caption teaches that the look comes unasked."""
    trigger: str | None = Field(None, min_length=1)
    """The phrase by which captions call for what is taught. With it, `preserve` knows how to ask without, validation what
    to compare, and the adapter's file says what it answers to."""
    phrases: list[Annotated[str, Field(min_length=1)]] = []
    """Further ones, each for something that a part of the images shows: what tools/prepare.py was given as descriptors.
    Asking without the trigger is asking without them, too; one left out here is unlearnt."""

    @model_validator(mode="after")
    def _phrases_beside_a_trigger(self) -> "Data":
        if self.phrases and self.trigger is None:
            raise ValueError(f"phrases {self.phrases} are further ones beside trigger, which is not set")
        return self

    @property
    def all_phrases(self) -> list[str]:
        """The trigger, if there is one, and the others."""
        return [self.trigger, *self.phrases] if self.trigger else []

    @model_validator(mode="after")
    def _one_form(self) -> "Data":
        if (self.shards is None) == (not self.sources):
            both = "both are given" if self.sources else "none is given"
            raise ValueError(f"expected either shards or sources.NAME.shards, {both}")
        unweighted = [name for name, source in self.sources.items() if source.weight is None]
        if 0 < len(unweighted) < len(self.sources):
            raise ValueError(
                f"sources.{unweighted[0]} has no weight, others have; give all sources a weight, or none"
            )
        return self

    def all_sources(self) -> dict[str, Source]:
        """The sources in either form."""
        return self.sources if self.shards is None else {"data": Source(shards=self.shards)}


class Lora(Section):
    rank: int = Field(32, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by alpha/rank (alpha/sqrt(rank) with rslora)."""
    rslora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    dora: bool = False
    """DoRA (Liu et al. 2024): each row of W + BA is scaled to a norm that is trained, too. On the plain path alone:
    slower, and with full weights. Files in PEFT's format."""
    targets: str | list[str] = DECODER_LINEARS
    """PEFT target modules: a regular expression over module names, or a list of name endings."""
    rank_pattern: dict[str, Annotated[int, Field(ge=1, le=1024)]] = {}
    """Other ranks by PEFT's patterns: a regular expression for how module names end, the first that matches counts:
    "self_attn.q_proj" = 64 in every layer, 'layers\\.[0-3]\\..*' = 8 in the first four."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Other alphas, likewise."""

    @model_validator(mode="after")
    def _patterns(self) -> "Lora":
        for option in ("rank_pattern", "alpha_pattern"):
            for key in getattr(self, option):
                try:
                    re.compile(key)
                except re.error as error:
                    raise ValueError(f"{option} {key!r} is not a regular expression ({error})") from None
        return self


class Flow(Section):
    sigma: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the noise level."""
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    """Moves the levels: s(x) = shift x / (1 + (shift - 1) x); 1 leaves them."""
    shift_area: int | None = Field(None, ge=PATCH, multiple_of=PATCH)
    """Side in pixels of the square picture that `shift` is meant for: one of n times its patches gets
    shift sqrt(n), since more pixels show more through the same noise; unset: all get the same."""
    weighting: Literal["x0", "velocity", "min_snr"] = "x0"
    """Error in the clean image, in the velocity (x0 error / sigma^2), or x0 error times min(SNR, gamma) / gamma."""
    min_snr_gamma: float = Field(5.0, gt=0)
    """The gamma of weighting min_snr: levels whose signal-to-noise ratio is above it count alike."""
    perceptual: Path | None = None
    """Folder of a frozen image encoder, a ViT such as DINOv2's: the predicted picture's features are held to the clean
    one's, too (hdl/flow/perceptual.py); unset: no such part of the loss. Never downloaded."""
    perceptual_weight: float = Field(0.1, gt=0)
    """Of that part: a sample's patches get this times (1 - sigma) times its features' mean cosine distance, 0 to 2."""


class Preserve(Section):
    """Prior preservation: some draws are asked for without the trigger phrase, and pulled to what the base itself
    predicts for them instead of to their pictures."""

    share: float = Field(0.2, ge=0, lt=1)
    """Of all draws, where data.trigger is set; 0: none."""
    weight: float = Field(16.0, ge=0)
    """Factor of their loss."""
    prompts: Path | None = None
    """Text file, a prompt a line, to ask with in place of the draws' own captions without the trigger. Packs of
    train.micro_batch_tokens are cut for the captions: there, prompts longer than the draw's own are passed over."""
    regularization: bool = False
    """Whether draws of regularization sources are such ones too, with their captions, besides `share`."""


class Train(Section):
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(4, ge=1)
    """Samples an optimizer step, over all ranks; batch_packs takes its place where that is set."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples a rank packs into one forward; unset: its whole share of the batch, no accumulation."""
    micro_batch_tokens: int | None = Field(None, ge=1)
    """In place of micro_batch_size: tokens of text and patches that a forward takes at most, of as many samples
    as fit (hdl/data/packing.py)."""
    batch_packs: int | None = Field(None, ge=1)
    """Such forwards an optimizer step, over all ranks, in place of batch_size; with micro_batch_tokens."""
    lr: float = Field(1e-4, gt=0)
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(50, ge=0)
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = "adamw"
    """adamw: moments in float32, 8 bytes a trained number. adamw_8bit: bitsandbytes', 2 bytes, on a GPU;
    paged_adamw_8bit: where they move to host memory while the GPU is full, at some speed."""
    master: Literal["float32", "bfloat16"] = "float32"
    """What the optimizer steps. float32: a copy of the adapter, 4 bytes a trained number. bfloat16: the adapter
    itself, rounded stochastically: no copy, but noise as large as bfloat16's steps; for ranks that do not fit
    otherwise. Needs optimizer adamw (whose moments stay float32), model.dtype bfloat16 and ZeRO 1 or 2."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of an average of the adapter over steps, kept beside it in float32; 0: none. It becomes adapter_ema/, with
    pictures and held_out_ema/ curves of its own. The decay starts low and grows as (1 + k) / (10 + k) with k updates
    (hdl/engine/ema.py)."""
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    max_skipped: int = Field(3, ge=0)
    """Steps that a run may skip, in all, because their loss or gradient is not finite or their loss a spike; one
    more ends it. Weights and moments stay as they were; the samples are in skipped.jsonl."""
    spike: float = Field(0.0, ge=0)
    """A loss above this many times the median of the last 50 is a spike; 0: none is."""
    patience: float = Field(30.0, ge=2)
    """Seconds that a rank may be silent, or keep the others waiting at a step, before the job ends naming it."""
    seed: int = Field(0, ge=0)
    deepspeed: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON: the sharding strategy."""

    @model_validator(mode="after")
    def _fits(self) -> "Train":
        if (self.micro_batch_tokens is None) != (self.batch_packs is None):
            given, lacking = ("micro_batch_tokens", "batch_packs")[:: 1 if self.batch_packs is None else -1]
            raise ValueError(f"{given} needs {lacking} beside it: tokens of a forward, and forwards a step")
        if self.micro_batch_size and self.micro_batch_tokens:
            raise ValueError(
                "micro_batch_size counts samples and micro_batch_tokens tokens; give one of them"
            )
        if self.micro_batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"micro_batch_size {self.micro_batch_size} does not divide batch_size {self.batch_size}"
            )
        if self.schedule == "cosine" and self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps {self.warmup_steps} must be below steps {self.steps}")
        if self.master == "bfloat16" and self.optimizer != "adamw":
            raise ValueError(
                f"master bfloat16 needs optimizer adamw: {self.optimizer} rounds to nearest, which loses small "
                "steps; use master float32 with it"
            )
        if 0 < self.spike <= 1:
            raise ValueError(
                f"spike {self.spike:g} would skip usual steps; it must be above 1, or 0 for none"
            )
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class Save(Section):
    output: Path
    """Folder of this run; must be new or empty, unless resume is given."""
    every: int = Field(500, ge=1)
    """Steps between checkpoints; the last step is always saved."""
    keep_last: int | None = Field(None, ge=1)
    """Checkpoints to keep: so many of the newest; unset: all."""
    keep_every: int | None = Field(None, ge=1)
    """Beside keep_last, checkpoints at multiples of so many steps stay."""
    license: str | None = None
    """Of the adapter, for whoever opens its file."""

    @model_validator(mode="after")
    def _keeps(self) -> "Save":
        if self.keep_every and not self.keep_last:
            raise ValueError(
                f"keep_every {self.keep_every} needs keep_last: without it, all checkpoints stay"
            )
        return self


class Validation(Section):
    prompts: list[str] = []
    """Drawn with and without the adapter, same seeds; no prompts: no pictures."""
    every: int = Field(500, ge=1)
    """Steps between pictures; also drawn before the first step and after the last."""
    height: int = Field(1024, ge=PATCH, multiple_of=PATCH)
    width: int = Field(1024, ge=PATCH, multiple_of=PATCH)
    steps: int = Field(50, ge=1, le=999)
    """Sampler steps of the full variant; dev always takes its own 28."""
    guidance_scale: float = Field(5.0, ge=0)
    shift: float = Field(3.0, gt=0)
    seed: int = Field(0, ge=0)
    """Picture i is drawn with seed + i."""
    held_out_samples: int = Field(32, ge=1)
    """Measurements of the x0 error on data.held_out at these steps, each at a noise level of its own; samples
    come again where fewer are held out."""
    drift: bool = True
    """With data.trigger and prompts: measure how far predictions move with the trigger and without (hdl/metrics/drift.py)."""
    style: str | None = None
    """What says how much of the look is in a picture: the folder of an image encoder, or a function of yours as
    package.module:function (hdl/metrics/scores.py). Its prompts must be with data.trigger and without."""
    style_references: Path | None = None
    """Folder of pictures in the look, for an image encoder."""
    memorization: bool = False
    """Measure how near the pictures' patches come to those trained on (hdl/metrics/memorization.py)."""
    drift_weight: float = Field(1.0, ge=0)
    """Of the score by which the best adapter is kept, gate - drift_weight x relative drift; needs style."""
    stop_after: int | None = Field(None, ge=1)
    """Validations without a better score after which the run ends; needs style."""

    @model_validator(mode="after")
    def _can_be_measured(self) -> "Validation":
        if self.stop_after and not self.style:
            raise ValueError(
                f"stop_after {self.stop_after} goes by a score, which needs style: an image encoder or a function"
            )
        if self.style_references and not self.style:
            raise ValueError("style_references are for the image encoder of style, which is not set")
        if (self.style or self.memorization) and not self.prompts:
            raise ValueError("style and memorization are measured on pictures: give prompts")
        return self


class Run(BaseSettings):
    """Train a LoRA on an O1. CONFIG is a TOML file with these sections, or several of which the later ones
    override the earlier; flags override them all."""

    model_config = SettingsConfigDict(extra="forbid", cli_prog_name="train.py")

    model: Model
    data: Data
    lora: Lora = Lora()
    flow: Flow = Flow()
    preserve: Preserve = Preserve()
    train: Train = Train()
    save: Save
    validation: Validation = Validation()
    resume: Literal["no", "must", "auto"] = "no"
    """Continue the newest checkpoint in save.output that is whole. must (or --resume alone): there has to be one;
    auto: or start, when there is none yet."""

    @property
    def caption_dropout(self) -> float:
        """data.caption_dropout, or what stands for it."""
        if self.data.caption_dropout is not None:
            return self.data.caption_dropout
        return 0.0 if self.preserves else 0.1

    @property
    def preserves(self) -> bool:
        """Whether draws are asked for without the trigger."""
        return self.data.trigger is not None and (self.preserve.share > 0 or self.preserve.regularization)


def load_run(arguments: list[str]) -> Run:
    """Parse `[CONFIG.toml ...] [--section.field VALUE ...]`; of several files, the later ones' fields count.

    HdlError for anything that is not a valid run.
    """
    files = [Path(name) for name in takewhile(lambda argument: not argument.startswith("-"), arguments)]
    flags = _resume_alone(arguments[len(files) :])
    described: dict[str, Any] = {}
    for file in files:
        for name, fields in read_toml(file, "describes the run").items():
            merged = isinstance(fields, dict) and isinstance(described.get(name), dict)
            described[name] = described[name] | fields if merged else fields

    class Described(Run):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            *unused: PydanticBaseSettingsSource,
            **also_unused: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            parser = _Parser(prog="train.py CONFIG.toml ...", description=Run.__doc__)
            line = _Line(
                settings_cls,
                cli_parse_args=flags,
                root_parser=parser,
                cli_implicit_flags=True,
                cli_hide_none_type=True,
                cli_avoid_json=True,
            )
            return (line, init_settings)

    try:
        return Run.model_construct(**dict(Described(**described)))
    except ValidationError as error:
        where = f"{', '.join(map(str, files))}: " if files else ""
        raise HdlError(where + "; ".join(_explain(e) for e in error.errors())) from None
    except SettingsError as error:
        raise HdlError(f"command line: {error}; lists and tables are written as JSON there") from None


class _Line(CliSettingsSource[Any]):
    """Flags. Of lists: JSON, or a text that is taken whole, for prompts and regular expressions have commas in them."""

    def _merge_parsed_list(self, parsed_list: list[str], field_name: str) -> str:
        kinds = _kinds_of(field_name)
        texts = [given for given in parsed_list if isinstance(given, str)]
        if list not in kinds or not texts or any(text.lstrip().startswith("[") for text in texts):
            return super()._merge_parsed_list(parsed_list, field_name)
        return json.dumps(texts[0] if len(texts) == 1 and len(kinds) > 1 else texts)


def _kinds_of(name: str) -> list[Any]:
    """What a field's value can be: `list` for a list of anything."""
    section, _, field = name.partition(".")
    inner = (
        getattr(Run.model_fields[section].annotation, "model_fields", {})
        if section in Run.model_fields
        else {}
    )
    annotation = inner[field].annotation if field in inner else None
    either = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return [get_origin(kind) or kind for kind in either]


def _resume_alone(flags: list[str]) -> list[str]:
    """`--resume` without a value says `must`."""
    following = [*flags[1:], "--"]
    return [
        "--resume=must" if flag == "--resume" and after.startswith("-") else flag
        for flag, after in zip(flags, following)
    ]


def save_run(run: Run, path: Path) -> None:
    """Write the resolved config as TOML; `train.py PATH` runs the same again."""
    path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, exclude={"resume"})))


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].lstrip("-").split("=")[0]
            hint = did_you_mean(flag, _all_fields())
        raise HdlError(f"command line: {message}{hint}; train.py --help lists every option")


def _all_fields() -> list[str]:
    names = []
    for section, field in Run.model_fields.items():
        inner = getattr(field.annotation, "model_fields", None)
        names += [f"{section}.{name}" for name in inner] if inner else [section]
    return names


def _explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    if error["type"] == "extra_forbidden":
        return f"unknown option {name}{did_you_mean(name, _all_fields() + list(Run.model_fields))}"
    if error["type"] == "missing":
        inner = (
            getattr(Run.model_fields[name].annotation, "model_fields", {}) if name in Run.model_fields else {}
        )
        required = [f"{name}.{field}" for field, info in inner.items() if info.is_required()]
        section = Run.model_fields[name].annotation if name in Run.model_fields else None
        return f"{', '.join(required) or getattr(section, 'required', name)} is required"
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    shown = "" if isinstance(found, (dict, BaseModel)) else f" (found {found!r})"
    return f"{name}: {message}{shown}"
