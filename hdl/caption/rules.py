"""From a model's answer to a caption: cleaned, refused or reworded, and put between trigger and descriptors.

Pure text, so that a changed rule is applied to answers of an earlier run without asking the model again.
"""

import re
import unicodedata
from dataclasses import replace

from hdl.caption.question import Answer
from hdl.caption.settings import Settings
from hdl.data.captions import CONTROL, MAX_CAPTION_BYTES, Look, compose, triggered
from hdl.data.images import Skip

EMPTY, REFUSED, TOO_LONG = "empty", "refused", "too long"
SPECIAL = re.compile(r"<\|[A-Za-z0-9_]+\|>")  # how models write the ends of messages
SENTENCE = re.compile(r""".*(?:[.!?…]["'”’)\]»]*(?=\s|$)|[。！？][」』”]*)""")
JOINERS = "\u200c\u200d"  # format characters that letters of some scripts, and emoji, are made with


def caption_of(answer: Answer, look: Look, settings: Settings) -> str:
    """The caption. Skip ("empty", "refused" or "too long") where the answer is none."""
    text = clean(answer.text)
    if answer.cut and (whole := SENTENCE.match(text)):
        text = whole.group()
    if any(re.search(pattern, text, re.IGNORECASE) for pattern in settings.refusals):
        raise Skip(REFUSED, f"the model refused: {text[:120]!r}")
    for rule in settings.replace:
        text = " ".join(re.sub(rule.pattern, rule.with_, text).split())
    if not text:
        raise Skip(EMPTY, f"nothing is left of the model's answer {answer.text[:60]!r}")
    caption = CONTROL.sub("", led(f"{settings.prefix}{text}{settings.suffix}".strip(), look, settings))
    if (size := len(caption.encode())) > MAX_CAPTION_BYTES:
        raise Skip(
            TOO_LONG,
            f"the caption would have {size:,} bytes, more than any prompt may have ({MAX_CAPTION_BYTES:,})",
        )
    return caption


def clean(text: str) -> str:
    """Without a reasoning model's thoughts, special tokens and control characters, all whitespace single spaces."""
    text = SPECIAL.sub(" ", text.rpartition("</think>")[2])
    seen = [c for c in text if c.isspace() or c in JOINERS or not unicodedata.category(c).startswith("C")]
    return " ".join("".join(seen).split())


def led(text: str, look: Look, settings: Settings) -> str:
    """With descriptors behind and the trigger in front, also where the text holds it further on: the trigger
    is to stand first in every caption."""
    around = settings.around()
    caption = compose(text, look, replace(around, trigger=None))
    if not around.trigger or not triggered(look, around):
        return caption
    if re.match(rf"{re.escape(around.trigger)}(?!\w)", caption, re.IGNORECASE):
        return caption
    return f"{around.trigger}, {caption}"
