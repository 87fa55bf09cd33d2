"""Asking for the same without the trigger phrase: what prior preservation asks with (hdl/flow/preservation.py).

A kept draw's caption is taken without its trigger, or a prompt of a list takes its place. Either is tokenized when it
is drawn, so that shards need not be prepared for it.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from threading import Lock

import numpy as np
import torch

from hdl.data.mixture import Mixture
from hdl.data.samples import Sample
from hdl.errors import HdlError
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.seeds import uniform_at

LOOKED_AT = 2000  # captions that are searched for the trigger before a run


class Untriggered:
    """A run's way to ask without the trigger. `reword` may be called from several threads."""

    def __init__(
        self, encoder: PromptEncoder, phrases: Sequence[str], seed: int, prompts: Sequence[str] = ()
    ) -> None:
        """phrases: the trigger, and others that call for something taught; prompts: to ask with in place of captions;
        none: captions. HdlError for one that holds a phrase or is too long."""
        self.encoder, self.seed = encoder, seed
        either = "|".join(_phrase(phrase) for phrase in phrases)
        self._trigger = re.compile(rf"(?:{either})[\s,.:;]*", re.IGNORECASE)
        for prompt in prompts:
            if self.asks(prompt):
                raise HdlError(
                    f"preserve.prompts: {prompt!r} holds the trigger or a phrase ({', '.join(phrases)}); these prompts are for "
                    "asking without them"
                )
        self._prompts = [(prompt, encoder.ids(prompt)) for prompt in prompts]
        self._lock = Lock()  # tokenizers are not made for several threads

    @property
    def longest_prompt(self) -> int:
        """Tokens; 0 without a list."""
        return max((len(ids) for _, ids in self._prompts), default=0)

    @property
    def shortest_prompt(self) -> int:
        return min((len(ids) for _, ids in self._prompts), default=0)

    def asks(self, caption: str) -> bool:
        """Whether a phrase is in it."""
        return self._trigger.search(caption) is not None

    def without(self, caption: str) -> str:
        """The caption with every phrase, and the comma behind it, taken out."""
        return self._trigger.sub("", caption).strip(" ,;:\n") or UNCONDITIONAL_PROMPT

    def reword(self, sample: Sample, number: int, room: int | None) -> Sample:
        """The sample asked for without the trigger. number: of its draw, which chooses the prompt; room: tokens that
        its text may take, None for any: a prompt of the list that is longer is passed over."""
        if self._prompts and not sample.references:
            first = int(uniform_at(np.array([number]), self.seed, "prompt")[0] * len(self._prompts))
            for i in range(len(self._prompts)):
                prompt, ids = self._prompts[(first + i) % len(self._prompts)]
                if room is None or len(ids) <= room:
                    return self._with(sample, prompt, ids)
        caption = self.without(sample.caption)
        if caption == sample.caption or not sample.caption:
            return sample
        grids = [(seen.rows, seen.cols) for seen in sample.seen]
        with self._lock:
            return self._with(sample, caption, self.encoder.ids(caption, grids))

    def _with(self, sample: Sample, caption: str, ids: list[int]) -> Sample:
        grids = [(seen.rows, seen.cols) for seen in sample.seen]
        return replace(
            sample, caption=caption, input_ids=torch.tensor(ids), text_embeds=self.encoder.embed(ids),
            seen=self.encoder.seen(ids, grids) if grids else (),
        )  # fmt: skip


def read_prompts(file: Path) -> list[str]:
    """The lines of a text file that hold something. HdlError when none does, or it cannot be read."""
    try:
        lines = [line.strip() for line in file.read_text(encoding="utf-8").splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise HdlError(f"preserve.prompts {file}: not readable as text ({error})") from None
    if not any(lines):
        raise HdlError(f"preserve.prompts {file}: no prompt there; expected one a line")
    return [line for line in lines if line]


def check_phrase(mixture: Mixture, option: str, said: str) -> None:
    """HdlError when none of the captions that are trained on, or of the first many, holds what an option says."""
    phrase = re.compile(_phrase(said), re.IGNORECASE)
    trained = np.flatnonzero(mixture.quotas.expected > 0)
    spread = trained[:: max(1, len(trained) // LOOKED_AT)].tolist()
    looked_at = (caption for sample in spread for caption in mixture.info(sample).captions)
    first = None
    for caption in looked_at:
        first = first or caption
        if phrase.search(caption):
            return
    raise HdlError(
        f"{option} {said!r} is in no caption of the data ({first!r}, for one); give what the images were prepared with "
        f"(tools/prepare.py --trigger, --tag-descriptor), or leave {option} out"
    )


def _phrase(trigger: str) -> str:
    return rf"(?<!\w){re.escape(trigger)}(?!\w)"
