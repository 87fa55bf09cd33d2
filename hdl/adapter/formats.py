"""An adapter apart from any model: read from PEFT, ComfyUI, kohya/musubi or DiffSynth files, written as the first three.

What is kept: A, B and alpha of every module in their own dtypes, rank-stabilised scaling, metadata. A file written
here and read again is the same adapter to the bit, in whichever format. The names are those of hdl/adapter/names.py.

ComfyUI and kohya know no rank-stabilised scaling (rslora): they get the alpha that scales alike, alpha * sqrt(rank),
and the metadata says what it was made from. Where the two disagree, somebody changed the file: the tensors count.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from peft.utils.other import get_pattern_key
from torch import Tensor

from hdl.adapter.metadata import BASE, sizes
from hdl.adapter.names import Format, Part, key_of, linears, parse_key
from hdl.errors import HdlError
from hdl.o1.checkpoint import Checkpoint
from hdl.tensor_files import DTYPES, opened, whole, write_tensors

WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's
WRITTEN: tuple[Format, ...] = ("peft", "comfyui", "kohya")
RSLORA = "hdl.rslora"  # metadata of formats that know none: PEFT's lora_alpha and alpha_pattern as JSON
MOST_NAMED = 8
# Fields of a PEFT config that change what is computed, and the value that does not.
UNCHANGED = {
    "bias": "none",
    "lora_bias": False,
    "fan_in_fan_out": False,
    "modules_to_save": None,
    "layer_replication": None,
    "trainable_token_indices": None,
    "target_parameters": None,
}


@dataclass(frozen=True)
class Pair:
    """One module's: a [rank, in], b [out, rank]; magnitude [out] with DoRA, the norms of the rows of W + scale B A."""

    a: Tensor
    b: Tensor
    alpha: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        return len(self.a)


@dataclass(frozen=True)
class Adapter:
    """pairs: by module, in order of name. rslora: alpha is divided by sqrt(rank) instead of rank."""

    pairs: dict[str, Pair]
    rslora: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    format: Format = "peft"  # of the file it was read from

    @property
    def dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def scale(self, module: str) -> float:
        """What B A x is multiplied by."""
        pair = self.pairs[module]
        return pair.alpha / (math.sqrt(pair.rank) if self.rslora else pair.rank)


def read_adapter_file(path: Path) -> Adapter:
    """Read a PEFT folder or a .safetensors file; the format is seen from the names of its tensors.

    HdlError naming what is wrong: no safetensors by content, unknown tensors, two formats at once, half a pair,
    shapes that do not belong together, a number that is not finite, a PEFT config that asks for more than LoRA
    and DoRA, DoRA of some modules only.
    """
    file = _weights_file(path)
    with opened(file) as tensors:
        places = _sort_keys(file, list(tensors.keys()))
        metadata = tensors.metadata() or {}
        found = {spot: tensors.get_tensor(key) for spot, key in places.keys.items()}
    for spot, tensor in found.items():
        _check_numbers(file, places.keys[spot], tensor, scalar=spot[1] == "alpha")
    halves = [
        f"{module} ({'B' if (module, 'A') in found else 'A'} is missing)"
        for module in places.modules
        if not {(module, "A"), (module, "B")} <= found.keys()
    ]
    if halves:
        raise HdlError(f"{file} holds only halves of its adapters of {_some(halves)}; is it complete?")
    matrices = {m: (found[m, "A"], found[m, "B"]) for m in places.modules}
    for module, (a, b) in matrices.items():
        if a.ndim != 2 or b.ndim != 2 or not 0 < a.shape[0] == b.shape[1]:
            raise HdlError(
                f"{file}: the matrices of {module} do not belong together: A is {list(a.shape)}, expected [rank, in], "
                f"B is {list(b.shape)}, expected [out, rank]"
            )
    norms = {m: found[m, "magnitude"] for m in places.modules if (m, "magnitude") in found}
    for module, norm in norms.items():
        if norm.shape != (rows := matrices[module][1].shape[:1]):
            raise HdlError(
                f"{file}: DoRA's magnitude of {module} is {list(norm.shape)}, expected {list(rows)}"
            )
    if norms and places.format != "peft":
        raise HdlError(
            f"{file} has DoRA's magnitudes in {places.format} format; they are read from PEFT's alone"
        )
    if places.format == "peft":
        _check_dora(file, places.modules, norms)
        alphas, rslora = _peft_alphas(file, {module: len(a) for module, (a, _) in matrices.items()})
    else:
        stored = {
            m: float(found[m, "alpha"]) if (m, "alpha") in found else float(len(a))
            for m, (a, _) in matrices.items()
        }
        alphas, rslora = _rslora_alphas(stored, {m: len(a) for m, (a, _) in matrices.items()}, metadata)
    useless = [module for module, alpha in alphas.items() if not 0 < alpha < math.inf]
    if useless:
        raise HdlError(f"{file}: alpha of {_some(useless)} is not a finite number above 0")
    metadata = {name: value for name, value in metadata.items() if name != RSLORA}
    pairs = {module: Pair(a, b, alphas[module], norms.get(module)) for module, (a, b) in matrices.items()}
    return Adapter(pairs, rslora, metadata, places.format)


def check_fits(adapter: Adapter, checkpoint: Checkpoint, name: str) -> str | None:
    """A notice when the file cannot say which base it is of; HdlError when it is of another, or of other shapes."""
    sizes = linears(checkpoint)
    missing = [module for module in adapter.pairs if module not in sizes]
    wrong = [
        f"{module} is [{len(pair.b)}, {pair.a.shape[1]}], expected {list(sizes[module])}"
        for module, pair in adapter.pairs.items()
        if module in sizes and (len(pair.b), pair.a.shape[1]) != sizes[module]
    ]
    if missing or wrong:
        problems = ([f"it adapts {_some(missing)}, which the base lacks"] if missing else []) + (
            [f"its shapes differ: {_some(wrong)}"] if wrong else []
        )
        raise HdlError(
            f"{name} does not fit {checkpoint.path}: {'; '.join(problems)}. Use it with the base it was trained on"
        )
    trained_on = adapter.metadata.get(BASE)
    if trained_on is None:
        return f"{name} does not say which base it was trained on; its shapes fit {checkpoint.path}, the rest is trust"
    if trained_on != (here := checkpoint.fingerprint()):
        raise HdlError(
            f"{name} was trained on another base: it names {trained_on}, {checkpoint.path} is {here}. Use it with "
            "its own base"
        )
    return None


def write_adapter_file(adapter: Adapter, out: Path, format: Format, dtype: torch.dtype | None = None) -> None:
    """Write a PEFT folder, or a file in another format, at once or not at all; dtype None keeps every tensor's own.

    HdlError when `out` is there already, its name does not suit the format, a number does not fit the dtype, or the
    format has nothing for DoRA.
    """
    if adapter.dora and format != "peft":
        raise HdlError(
            f"{out}: this adapter is a DoRA, which is written in PEFT's format alone: others spell it in ways that their "
            "programs compute differently; use format peft"
        )
    if (out.suffix == ".safetensors") == (format == "peft"):
        expected = "a folder" if format == "peft" else "a .safetensors file"
        raise HdlError(f"{out}: an adapter in {format} format is {expected}; name it so")
    tensors: dict[str, Tensor] = {}
    for module, pair in adapter.pairs.items():
        parts: dict[Part, Tensor] = {"A": pair.a, "B": pair.b}
        if pair.magnitude is not None:
            parts["magnitude"] = pair.magnitude
        for part, weight in parts.items():
            key = key_of(module, part, format)
            tensors[key] = weight if dtype is None else weight.to(dtype)
            _check_numbers(out, key, tensors[key])
        if format != "peft":
            alpha = adapter.scale(module) * pair.rank if adapter.rslora else pair.alpha
            tensors[key_of(module, "alpha", format)] = _exactly(alpha, tensors[key].dtype)
    metadata = {**adapter.metadata, **numbers(adapter), "format": "pt"}
    if adapter.rslora and format != "peft":
        common, others = common_alpha(adapter)
        metadata[RSLORA] = json.dumps({"lora_alpha": common, "alpha_pattern": others}, sort_keys=True)
    with whole(out) as partial:
        if format == "peft":
            partial.mkdir()
            write_tensors(partial / WEIGHTS_FILE, tensors, metadata)
            (partial / CONFIG_FILE).write_text(config_text(peft_config(adapter)), encoding="utf-8")
        else:
            write_tensors(partial, tensors, metadata)


def numbers(adapter: Adapter) -> dict[str, str]:
    return sizes((p.rank for p in adapter.pairs.values()), (p.alpha for p in adapter.pairs.values()))


def peft_config(adapter: Adapter) -> LoraConfig:
    """The config with which PEFT makes these very modules."""
    rank = _commonest([pair.rank for pair in adapter.pairs.values()])
    alpha, alphas = common_alpha(adapter)
    return LoraConfig(
        r=int(rank),
        lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT computes with any number
        rank_pattern={m: pair.rank for m, pair in adapter.pairs.items() if pair.rank != rank},
        alpha_pattern=alphas,
        use_rslora=adapter.rslora,
        use_dora=adapter.dora,
        target_modules=sorted(adapter.pairs),
        inference_mode=True,
    )


def config_text(config: LoraConfig) -> str:
    """adapter_config.json; like PEFT's own, but the same every time."""
    fields = {
        key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()
    }
    return json.dumps(fields, indent=2, sort_keys=True) + "\n"


def common_alpha(adapter: Adapter) -> tuple[float, dict[str, float]]:
    """The commonest alpha and those of the modules that have another."""
    common = _commonest([pair.alpha for pair in adapter.pairs.values()])
    others = {module: _short(pair.alpha) for module, pair in adapter.pairs.items() if pair.alpha != common}
    return _short(common), others


def with_metadata(adapter: Adapter, added: Mapping[str, str | None]) -> Adapter:
    """The adapter with metadata added or replaced; None leaves what is there."""
    given = {name: value for name, value in added.items() if value is not None}
    return replace(adapter, metadata={**adapter.metadata, **given})


@dataclass(frozen=True)
class _Keys:
    format: Format
    modules: list[str]
    keys: dict[tuple[str, Part], str]


def _sort_keys(file: Path, names: list[str]) -> _Keys:
    parsed = {name: parse_key(name) for name in names}
    unknown = sorted(name for name, spot in parsed.items() if spot is None)
    if unknown or not names:
        raise HdlError(
            f"{file}: not the tensors of a LoRA of an O1: {_some(unknown) or 'there are none'}. Expected names as in "
            f"{', '.join(key_of('model.language_model.layers.0.mlp.up_proj', 'A', f) for f in WRITTEN)}; LoHa, LoKr, "
            "DoRA other than PEFT's and adapters of convolutions or of other models are not read"
        )
    by_format: dict[Format, str] = {}
    keys: dict[tuple[str, Part], str] = {}
    for name, spot in parsed.items():
        assert spot
        format, module, part = spot
        by_format.setdefault(format, name)
        if (module, part) in keys and len(by_format) == 1:
            raise HdlError(
                f"{file} holds {part} of {module} twice, as {keys[module, part]} and as {name}; remove one"
            )
        keys[module, part] = name
    if len(by_format) > 1:
        raise HdlError(
            f"{file} mixes formats: {'; '.join(f'{f}: {name}' for f, name in by_format.items())}. Expected one; "
            "convert or separate them first"
        )
    return _Keys(next(iter(by_format)), sorted({module for module, _ in keys}), keys)


def _weights_file(path: Path) -> Path:
    if not path.exists():
        raise HdlError(f"{path}: no such adapter; expected a PEFT folder or a .safetensors file")
    if path.is_file():
        return path
    found = [path / WEIGHTS_FILE] if (path / WEIGHTS_FILE).is_file() else sorted(path.glob("*.safetensors"))
    if len(found) == 1:
        return found[0]
    pickles = [f.name for f in path.iterdir() if f.suffix in (".bin", ".pt", ".pth", ".ckpt")]
    more = f"; {', '.join(pickles)} may be pickles, which hdl never reads" if pickles and not found else ""
    raise HdlError(
        f"{path}: expected {WEIGHTS_FILE} or exactly one .safetensors file, found {len(found)}{more}"
    )


def _check_dora(file: Path, modules: list[str], norms: Mapping[str, Tensor]) -> None:
    """HdlError unless all modules have a magnitude and the config says so, or none has and it does not."""
    try:
        said = bool(json.loads(file.with_name(CONFIG_FILE).read_text(encoding="utf-8")).get("use_dora"))
    except (OSError, ValueError, AttributeError):
        return  # what is wrong with it is said where its alpha is read
    expected = len(modules) if said else 0
    if len(norms) != expected:
        raise HdlError(
            f"{file} has DoRA's lora_magnitude_vector of {len(norms)} modules, expected {expected} of {len(modules)}: "
            f"{CONFIG_FILE} says use_dora {said}; the two are not of one adapter"
        )


def _peft_alphas(file: Path, ranks: dict[str, int]) -> tuple[dict[str, float], bool]:
    config_file = file.with_name(CONFIG_FILE)
    try:
        config: dict[str, Any] = json.loads(config_file.read_text(encoding="utf-8"))
        kind = config["peft_type"]
        alpha, r = float(config["lora_alpha"]), int(config["r"])
        alpha_pattern = {str(k): float(v) for k, v in (config.get("alpha_pattern") or {}).items()}
        rank_pattern = {str(k): int(v) for k, v in (config.get("rank_pattern") or {}).items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise HdlError(
            f"{config_file}: not the config of a PEFT LoRA ({type(error).__name__}: {error}); its alpha stands there, "
            "so the adapter cannot be used without"
        ) from None
    odd = [
        f"{name} {config[name]!r}"
        for name, value in UNCHANGED.items()
        if config.get(name, value) not in (value, [])
    ]
    if kind != "LORA" or odd:
        raise HdlError(f"{config_file}: only LoRA and DoRA are read, found {', '.join([str(kind), *odd])}")
    for module, rank in ranks.items():
        expected = rank_pattern.get(get_pattern_key(list(rank_pattern), module), r)
        if rank != expected:
            raise HdlError(
                f"{file}: {module} has rank {rank}, {CONFIG_FILE} says {expected}; the two are not of one adapter"
            )
    alphas = {m: alpha_pattern.get(get_pattern_key(list(alpha_pattern), m), alpha) for m in ranks}
    return alphas, bool(config.get("use_rslora"))


def _rslora_alphas(
    stored: dict[str, float], ranks: dict[str, int], metadata: dict[str, str]
) -> tuple[dict[str, float], bool]:
    """PEFT's alphas where metadata names them and they scale as the stored ones do; else the stored ones."""
    try:
        said = json.loads(metadata[RSLORA])
        alphas = {m: float(said["alpha_pattern"].get(m, said["lora_alpha"])) for m in stored}
    except (KeyError, ValueError, TypeError, AttributeError):
        return stored, False
    agrees = all(alphas[m] / math.sqrt(ranks[m]) * ranks[m] == stored[m] for m in stored)
    return (alphas, True) if agrees else (stored, False)


def _exactly(value: float, preferred: torch.dtype) -> Tensor:
    """A scalar in the weights' dtype, as kohya's trainers store alpha, or in a wider one where that would round it."""
    kinds = (preferred, torch.float32, torch.float64)
    return next(scalar for d in kinds if float(scalar := torch.tensor(value, dtype=d)) == value)


def _check_numbers(file: Path, name: str, tensor: Tensor, scalar: bool = False) -> None:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if scalar and tensor.numel() != 1:
        raise HdlError(f"{file}: {name} is {list(tensor.shape)}, expected one number")
    if not scalar and tensor.dtype not in DTYPES:
        raise HdlError(f"{file}: {name} is {dtype}, expected floating-point numbers")
    broken = int((~torch.isfinite(tensor.double())).sum())
    if broken:
        raise HdlError(
            f"{file}: {name} holds {broken} numbers that are not finite in {dtype}; such an adapter draws noise at best"
        )


def _commonest(values: list[Any]) -> Any:
    return Counter(values).most_common(1)[0][0]


def _short(value: float) -> float:
    """PEFT's configs have whole alphas as integers."""
    return int(value) if value == int(value) else value


def _some(names: list[str]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
