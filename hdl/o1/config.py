"""What of a checkpoint's `config.json` (a `Qwen3VLConfig`) the trainer needs, checked.

Only the text decoder's numbers and a few token ids matter to text-to-image training; the visual
tower's part is left alone. Both spellings of the rotary settings are read: `rope_scaling` with
`rope_theta` beside it (transformers 4) and `rope_parameters` (transformers 5).
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hdl.errors import HdlError

MODEL_TYPE = "qwen3_vl"


@dataclass(frozen=True)
class O1Config:
    """Shape of the decoder; names as in the checkpoint's `text_config`."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    mrope_section: tuple[int, int, int]


def read_config(path: Path) -> O1Config:
    """Read `config.json`; raises HdlError naming the file and the field when it is not an O1's."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise HdlError(f"{path}: not found; an O1 checkpoint folder holds its config.json there") from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise HdlError(f"{path}: not readable as JSON ({error})") from None
    try:
        return parse_config(raw)
    except HdlError as error:
        raise HdlError(f"{path}: {error}") from None


def parse_config(raw: Any) -> O1Config:
    """Pick and check the decoder's fields out of a parsed `config.json`."""
    found = raw.get("model_type") if isinstance(raw, dict) else type(raw).__name__
    if found != MODEL_TYPE:
        raise HdlError(
            f"model_type is {found!r}, expected {MODEL_TYPE!r}: this is the config of another model, not of an O1"
        )
    text = raw.get("text_config")
    if not isinstance(text, dict):
        raise HdlError("text_config is missing; expected a Qwen3VLConfig with the decoder's sizes in it")
    rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
    values = {
        **text,
        "rope_theta": rope.get("rope_theta", text.get("rope_theta")),
        "mrope_section": rope.get("mrope_section"),
    }
    missing = [name for name in O1Config.__dataclass_fields__ if values.get(name) is None]
    if missing:
        raise HdlError(f"text_config lacks {', '.join(missing)}; expected a Qwen3VLConfig of an O1")
    for field, expected in (("attention_bias", False), ("hidden_act", "silu")):
        if text.get(field, expected) != expected:
            raise HdlError(
                f"text_config.{field} is {text[field]!r}, expected {expected!r}: not an O1 decoder"
            )

    config = O1Config(**{name: values[name] for name in O1Config.__dataclass_fields__ if name != "mrope_section"},
                      mrope_section=tuple(values["mrope_section"]))  # fmt: skip
    if len(config.mrope_section) != 3 or sum(config.mrope_section) != config.head_dim // 2:
        raise HdlError(
            f"mrope_section {config.mrope_section} must be three numbers that add up to head_dim/2 = "
            f"{config.head_dim // 2}"
        )
    if config.num_attention_heads % config.num_key_value_heads:
        raise HdlError(
            f"num_attention_heads {config.num_attention_heads} is not a multiple of "
            f"num_key_value_heads {config.num_key_value_heads}"
        )
    return config
