"""Scenes put into words, in many ways of saying the same.

Some captions begin with a made-up style name that means nothing: a model that has met many of those draws the rest
of the caption undisturbed when a new one comes, such as the trigger phrase of a LoRA, and waits to be taught.
"""

import re

import numpy as np

from hdl.mini.scenes import Look, Scene, Thing

SIZES = {"small": ("small", "little"), "big": ("big", "large")}
PLACES = {
    "top left": ("at the top left", "in the top left corner"),
    "top": ("at the top",),
    "top right": ("at the top right", "in the top right corner"),
    "left": ("on the left", "at the left"),
    "middle": ("in the middle", "in the centre"),
    "right": ("on the right", "at the right"),
    "bottom left": ("at the bottom left", "in the bottom left corner"),
    "bottom": ("at the bottom",),
    "bottom right": ("at the bottom right", "in the bottom right corner"),
}
SETTINGS = {
    "meadow": ("on a green meadow", "in a meadow under a blue sky", "over green hills"),
    "sea": ("on a calm sea", "at the sea", "over the blue sea"),
    "night": ("under the stars at night", "in a starry night", "at night"),
    "desert": ("in a desert", "between sand dunes"),
    "room": ("in a room", "in a plain room with a wooden floor"),
    "snow": ("in the snow", "on snowy hills"),
    "sunset": ("at sunset", "before a setting sun"),
    "forest": ("in a forest", "before a forest of fir trees"),
    "pale yellow": ("on a pale yellow background", "before a pale yellow wall"),
    "pale blue": ("on a pale blue background", "before a pale blue wall"),
    "pale pink": ("on a pale pink background", "before a pale pink wall"),
    "grey": ("on a grey background", "before a grey wall"),
}
TONES = {
    "black and white": ("in black and white", "without colours, in shades of grey"),
    "sepia": ("in sepia tones", "like an old sepia photograph"),
    "green ink": ("printed in green ink", "in shades of green only"),
    "red ink": ("printed in red ink", "in shades of red only"),
    "blue ink": ("printed in blue ink", "in shades of blue only"),
    "pastel": ("in pastel colours", "in pale pastel tones"),
    "dim": ("in dim light", "in dark, dim colours"),
}
OUTLINES = {
    "dark": ("drawn with a dark outline", "with dark outlines"),
    "white": ("with a white outline like a sticker", "with white outlines"),
}
SURFACES = {
    "shaded": ("softly shaded", "shaded from above"),
    "watercolour": ("in soft watercolour", "as a watercolour"),
}
LIGHTS = {"vignette": ("with dark corners", "with a vignette")}
FRAMES = ("in a {} frame", "with a {} border")
ORDINARY = ("a simple picture", "simply drawn", "a simple illustration")
OPENINGS = ("a picture of", "an illustration of", "a drawing of")
SYLLABLES = tuple(
    [
        "zo",
        "bel",
        "mi",
        "ra",
        "tur",
        "vo",
        "lin",
        "da",
        "ske",
        "pu",
        "gan",
        "fi",
        "nor",
        "qua",
        "che",
        "lu",
        "ya",
    ]
)
TRIGGER_FORMS = ("{} style", "{} look", "in the style of {}", "{}", "by {}")


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """The scene in one sentence or two: its things and their places, its setting, its look."""
    things, look = _things(scene, rng), look_words(scene.look, rng)
    setting = _say(SETTINGS[scene.setting], rng)
    way = rng.integers(5)
    if way == 0:
        return ", ".join([setting, things, *look])
    if way == 1:
        return ". ".join([f"{things}, {setting}", *([" and ".join(look)] if look else [])])
    if way == 2 and look:
        return f"{', '.join(look)}: {things} {setting}"
    opening = f"{_say(OPENINGS, rng)} " if way == 3 else ""
    return ", ".join([f"{opening}{things}", setting, *look])


def look_words(look: Look, rng: np.random.Generator) -> list[str]:
    """A phrase for everything that is not ordinary; for the ordinary look sometimes one that says so."""
    if look == Look():
        return [_say(ORDINARY, rng)] if rng.random() < 0.2 else []
    named = ((look.tone, TONES), (look.outline, OUTLINES), (look.surface, SURFACES), (look.light, LIGHTS))
    phrases = [_say(phrases[word], rng) for word, phrases in named if word]
    return phrases + ([_say(FRAMES, rng).format(look.frame)] if look.frame else [])


def meaningless_style(rng: np.random.Generator) -> str:
    """A made-up style name that stands for nothing: "zorabel style", "by mifinor"."""
    name = "".join(_say(SYLLABLES, rng) for _ in range(rng.integers(2, 5)))
    return _say(TRIGGER_FORMS, rng).format(name)


def loose_caption(scene: Scene, rng: np.random.Generator) -> str:
    """What pretraining reads: a caption; one in ten without its setting, which is then the model's to choose; one in
    five behind a style name that means nothing."""
    terse = rng.random() < 0.1
    words = ", ".join([_things(scene, rng), *look_words(scene.look, rng)]) if terse else caption(scene, rng)
    return f"{meaningless_style(rng)}, {words}" if rng.random() < 0.2 else words


def _things(scene: Scene, rng: np.random.Generator) -> str:
    return " and ".join(_thing(thing, rng) for thing in scene.things)


def _thing(thing: Thing, rng: np.random.Generator) -> str:
    return f"a {_say(SIZES[thing.size], rng)} {thing.colour} {thing.kind} {_say(PLACES[thing.place], rng)}"


def _say(phrases: tuple[str, ...], rng: np.random.Generator) -> str:
    return phrases[rng.integers(len(phrases))]


def names(text: str, word: str) -> bool:
    """True when the caption holds the word (or words) as such."""
    return re.search(rf"\b{re.escape(word)}\b", text) is not None
