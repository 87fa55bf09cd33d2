"""A caption's sentences in other orders: further captions that say the same.

A long caption is learnt with its order. Which sentence comes first says nothing of the picture, so the orders
are as good as each other; which ones are taken depends on the text alone, the same in every run.
"""

import math
import random
import re

# Where a sentence ends: behind its mark and closing quotes, before white space and anything but a small letter
# ("approx. ten"), not after a title or an initial; in scripts without spaces, behind the mark. White space is taken as a
# whole: if less of it would do, the rest would stand before the small letter.
ENDS = re.compile(
    r"(?<!\b[A-Z]\.)(?<!\bMr\.)(?<!\bMs\.)(?<!\bDr\.)(?<!\bSt\.)(?<!\bMrs\.)"
    r"(?:(?<=[.!?…])|(?<=[.!?…][\"”’)]))\s++(?![a-zß-öø-ÿ])"
    r"|(?<=[。！？])\s*"
)
CLOSING = '.!?…。！？"”’)'


def sentences(text: str) -> list[str]:
    return [part for part in ENDS.split(text) if part]


def reordered(text: str, count: int) -> list[str]:
    """Up to `count` texts of the same sentences in different orders, none of them the given one."""
    parts = sentences(text)
    # What was last may have had no full stop.
    ended = [part if part[-1] in CLOSING else part.rstrip(",;: ") + "." for part in parts]
    draw = random.Random(text)
    wanted = min(count, math.factorial(min(len(parts), 20)) - 1)
    orders: dict[tuple[int, ...], None] = {}
    while len(orders) < wanted:
        order = draw.sample(range(len(parts)), len(parts))
        if order != sorted(order):
            orders[tuple(order)] = None
    return [_joined([ended[i] for i in order]) for order in orders]


def _joined(parts: list[str]) -> str:
    """With a space between sentences, where their script has spaces."""
    text = parts[0]
    for part in parts[1:]:
        text += part if text[-1] in "。！？" else f" {part}"
    return text
