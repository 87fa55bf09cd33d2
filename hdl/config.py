"""A run, described: every option there is, with its unit, default and bounds.

One TOML file describes a run, or several, such as the run's own and a preset for the machine; any field can be
set on the command line on top of them:

    train.py RUN.toml launch/presets/24gb.toml --lora.rank 16 --train.steps 500

Unknown keys, wrong types and combinations that cannot work are refused before anything is loaded, each
named with what was expected.
"""

import argparse
import difflib
import tomllib
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, NoReturn

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, CliSettingsSource, PydanticBaseSettingsSource, SettingsConfigDict

from hdl.errors import HdlError
from hdl.o1.patches import PATCH

# The seven linears of every decoder layer; a regular expression over module names, as PEFT takes it.
DECODER_LINEARS = r".*language_model\.layers\.\d+\.(self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)"


Keep = Literal["everything", "products", "attention", "input"]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True, use_attribute_docstrings=True)


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
    keep: Keep | list[Keep] = "everything"
    """What backward finds ready, for all layers or one word a layer; the rest is recomputed. products:
    outputs of large products and of attention; attention: of attention; input: each layer's input."""
    memory: Literal["set", "auto"] = "set"
    """On a GPU. set: weights, keep and the optimizer are as set here; auto: as the fastest plan has them that fits
    the GPU (tools/plan.py)."""
    card: float | None = Field(None, gt=1)
    """GiB of the card to plan for and stay within, less 1 GiB for others; unset: all of the GPU's."""


class Data(Section):
    shards: Path
    """Folder written by tools/prepare.py with this base."""
    caption_dropout: float = Field(0.1, ge=0, le=1)
    """Share of samples trained with the empty prompt."""


class Lora(Section):
    rank: int = Field(32, ge=1, le=1024)
    alpha: float = Field(32.0, gt=0)
    """The adapter's output is scaled by alpha/rank (alpha/sqrt(rank) with rslora)."""
    rslora: bool = False
    dropout: float = Field(0.0, ge=0, lt=1)
    targets: str | list[str] = DECODER_LINEARS
    """PEFT target modules: a regular expression over module names, or a list of name endings."""


class Flow(Section):
    sigma: Literal["uniform", "logit_normal"] = "uniform"
    """Distribution of the noise level."""
    logit_mean: float = 0.0
    logit_std: float = Field(1.0, gt=0)
    shift: float = Field(1.0, gt=0)
    """Moves the levels: s(x) = shift x / (1 + (shift - 1) x); 1 leaves them."""
    weighting: Literal["x0", "velocity"] = "x0"
    """Error in the clean image, or in the velocity (x0 error / sigma^2)."""


class Train(Section):
    steps: int = Field(1000, ge=1)
    batch_size: int = Field(4, ge=1)
    """Samples an optimizer step, over all ranks."""
    micro_batch_size: int | None = Field(None, ge=1)
    """Samples a rank packs into one forward; unset: its whole share of the batch, no accumulation."""
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
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = Field(0.01, ge=0)
    grad_clip: float = Field(1.0, ge=0)
    """Largest norm of the gradient; 0: no clipping."""
    seed: int = Field(0, ge=0)
    deepspeed: Path = Path("ds_configs/zero2.json")
    """DeepSpeed JSON: the sharding strategy."""

    @model_validator(mode="after")
    def _fits(self) -> "Train":
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
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas {self.betas} must lie in [0, 1)")
        return self


class Save(Section):
    output: Path
    """Folder of this run; must be new or empty, unless resume is given."""
    every: int = Field(500, ge=1)
    """Steps between checkpoints; the last step is always saved."""


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


class Run(BaseSettings):
    """Train a LoRA on an O1. CONFIG is a TOML file with these sections, or several of which the later ones
    override the earlier; flags override them all."""

    model_config = SettingsConfigDict(extra="forbid", cli_prog_name="train.py")

    model: Model
    data: Data
    lora: Lora = Lora()
    flow: Flow = Flow()
    train: Train = Train()
    save: Save
    validation: Validation = Validation()
    resume: bool = False
    """Continue the newest checkpoint in save.output."""


def load_run(arguments: list[str]) -> Run:
    """Parse `[CONFIG.toml ...] [--section.field VALUE ...]`; of several files, the later ones' fields count.

    HdlError for anything that is not a valid run.
    """
    files = [Path(name) for name in takewhile(lambda argument: not argument.startswith("-"), arguments)]
    flags = arguments[len(files) :]
    described: dict[str, Any] = {}
    for file in files:
        for name, fields in _read_toml(file).items():
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
            line: CliSettingsSource[Any] = CliSettingsSource(
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


def save_run(run: Run, path: Path) -> None:
    """Write the resolved config as TOML; `train.py PATH` runs the same again."""
    path.write_text(tomli_w.dumps(run.model_dump(mode="json", exclude_none=True, exclude={"resume"})))


def _read_toml(file: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HdlError(f"{file}: no such config; give a TOML file that describes the run") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise HdlError(f"{file}: not readable as TOML ({error})") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        hint = ""
        if message.startswith("unrecognized arguments: "):
            flag = message.removeprefix("unrecognized arguments: ").split()[0].lstrip("-").split("=")[0]
            hint = _did_you_mean(flag, _all_fields())
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
        return f"unknown option {name}{_did_you_mean(name, _all_fields() + list(Run.model_fields))}"
    if error["type"] == "missing":
        inner = (
            getattr(Run.model_fields[name].annotation, "model_fields", {}) if name in Run.model_fields else {}
        )
        required = [f"{name}.{field}" for field, info in inner.items() if info.is_required()]
        return f"{', '.join(required) or name} is required"
    message = error["msg"].removeprefix("Value error, ")
    found = error["input"]
    shown = "" if isinstance(found, (dict, BaseModel)) else f" (found {found!r})"
    return f"{name}: {message}{shown}"


def _did_you_mean(name: str, known: list[str]) -> str:
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    return f" (did you mean {close[0]}?)" if close else ""
