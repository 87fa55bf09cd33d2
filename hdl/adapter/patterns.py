"""Ranks and alphas that differ from linear to linear, by PEFT's patterns.

A pattern's key is a regular expression that has to match a module's name from some dot on to the end, and the first
that does counts (peft.utils.other.get_pattern_key): "self_attn.q_proj" is every layer's, r"layers\\.[0-3]\\..*" all of
the first four.
"""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from peft.utils.other import get_pattern_key

from hdl.config import Lora
from hdl.errors import HdlError

T = TypeVar("T")


def value_of(pattern: Mapping[str, T], module: str, usual: T) -> T:
    """What the pattern says of a module, named as in the published checkpoint; `usual` where no key matches."""
    return pattern.get(get_pattern_key(list(pattern), module), usual)


def check_patterns(lora: Lora, adapted: Iterable[str]) -> None:
    """HdlError for a key that decides about none of the adapted modules: a misspelt one would train another adapter
    than was asked for, without a word."""
    names = list(adapted)
    for option, keys in (
        ("rank_pattern", list(lora.rank_pattern)),
        ("alpha_pattern", list(lora.alpha_pattern)),
    ):
        deciding = {get_pattern_key(keys, name) for name in names}
        for idle in (key for key in keys if key not in deciding):
            earlier = [
                key for key in keys if key != idle and any(get_pattern_key([idle], n) == idle for n in names)
            ]
            why = (
                f"every adapted linear that it matches is decided by a key before it ({', '.join(earlier)}); put "
                "the narrower key first, or leave it out"
                if earlier
                else f"it matches no adapted linear; names end as in {names[0]}"
            )
            raise HdlError(f"lora.{option} {idle!r}: {why}")
