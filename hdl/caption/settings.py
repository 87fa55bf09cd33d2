"""How a folder is captioned, described: every option there is, with its default and bounds.

One flat TOML file (`--config caption.toml`); the flags of tools/caption.py set the same fields on top of it.
"""

import re
from pathlib import Path
from string import Formatter
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from hdl.data.captions import CaptionOptions, Look
from hdl.errors import HdlError
from hdl.toml import did_you_mean, read_toml

PROMPT = """\
Write a caption of this picture for training an image generator: one paragraph of plain prose in English, 60 to \
150 words. Say who or what is shown, what they look like and wear, their pose, expression and action, then the \
setting, the framing and viewpoint, the light and the colours, and quote any text that can be read. Name plainly \
what is visible, nudity and sexual acts included; leave out what cannot be seen, opinions and the artist. Start \
with the subject itself, not with "The image shows". No headings, lists or markdown. Answer with the caption only."""

REFUSALS = [
    r"^(I['’]m|I am|We['’]re|We are) (really |very )?sorry\b",
    r"^(Sorry|Apologies|Unfortunately)\b.{0,20}\bI\b",
    r"^I ?(can['’]?t|cannot|can not|won['’]t|will not|must decline)\b",
    r"^I ?(['’]m|am) (unable|not able|not comfortable|not allowed)\b",
    r"^(As|I['’]m|I am) an AI\b",
]

Pattern = Annotated[str, StringConstraints(min_length=1)]
Phrase = Annotated[str, StringConstraints(min_length=1, strip_whitespace=True)]


class Described(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, use_attribute_docstrings=True
    )


class Replace(Described):
    pattern: Pattern
    """Regular expression, as Python's re.sub takes it."""
    with_: str = Field(alias="with")


class Settings(Described):
    model: Phrase = "google/gemma-4-E4B-it"
    """Image-text-to-text model: a folder, a hub name, or with `server` the name the server knows it by."""
    server: str | None = Field(None, pattern="^https?://")
    """URL of an OpenAI-compatible server, up to and with /v1; unset: the model runs here."""
    bits: Literal[4] | None = None
    """4: weights in bitsandbytes' nf4, on a GPU; unset: bfloat16 on a GPU, float32 on a CPU."""
    batch_size: int = Field(4, ge=1)
    """Images a forward takes; with `server`, requests at once."""
    max_side: int = Field(1024, ge=32)
    """Longer side in pixels to which images are shrunk before the model sees them."""
    prompt: Phrase = PROMPT
    """What the model is asked. {style} and {tags} stand for the image's entries in styles.json."""
    max_new_tokens: int = Field(400, ge=1)
    """Longest answer; a sentence that it cuts off is dropped."""
    temperature: float = Field(0.0, ge=0, le=2)
    """0: the likeliest answer, always the same; above: drawn, by `seed`."""
    seed: int = Field(0, ge=0)
    captions_per_image: int = Field(1, ge=1, le=100)
    """The first goes to NAME.txt, the others to NAME.1.txt, NAME.2.txt, ..."""
    trigger: Phrase | None = None
    """Put in front of every caption, or of those of trigger_styles and trigger_tags."""
    trigger_styles: list[str] = []
    trigger_tags: list[str] = []
    style_descriptors: dict[str, Phrase] = {}
    """Style in styles.json -> words put behind the captions of its images."""
    tag_descriptors: dict[str, Phrase] = {}
    prefix: str = ""
    """Put directly before the model's words, inside the trigger."""
    suffix: str = ""
    replace: list[Replace] = []
    """Done on the model's words, in this order, before prefix and suffix."""
    refusals: list[Pattern] = REFUSALS
    """Regular expressions, in any case; an answer that matches one is not a caption."""

    @model_validator(mode="after")
    def _can_work(self) -> Self:
        for pattern in [*self.refusals, *(rule.pattern for rule in self.replace)]:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"the pattern {pattern!r} is not a regular expression ({error})") from None
        for rule in self.replace:
            try:
                re.sub(rule.pattern, rule.with_, "")
            except (re.error, IndexError) as error:
                raise ValueError(f"replace {rule.pattern!r}: with {rule.with_!r}: {error}") from None
        try:
            unknown = sorted(placeholders(self.prompt) - {"style", "tags"})
        except ValueError as error:
            raise ValueError(f"prompt: {error}; double a brace that is meant as such") from None
        if unknown:
            raise ValueError(
                f"prompt: found {{{'}, {'.join(unknown)}}}, expected no braces but {{style}} and {{tags}}; double a "
                "brace that is meant as such"
            )
        if self.captions_per_image > 1 and not self.temperature:
            raise ValueError(
                f"captions_per_image {self.captions_per_image} needs a temperature above 0 (1.0, say): at 0 all "
                "captions of an image would be the same"
            )
        if self.bits and self.server:
            raise ValueError("bits is for a model that runs here, and server says that it runs elsewhere")
        return self

    def around(self) -> CaptionOptions:
        """What goes around the model's words."""
        return CaptionOptions(
            self.trigger,
            tuple(self.trigger_styles),
            tuple(self.trigger_tags),
            self.style_descriptors,
            self.tag_descriptors,
        )

    def prompt_for(self, look: Look) -> str:
        return self.prompt.format(style=look.style or "unknown", tags=", ".join(look.tags) or "none")


def placeholders(prompt: str) -> set[str]:
    """What stands in braces. ValueError where a brace is alone."""
    fields = [(name, spec, how) for _, name, spec, how in Formatter().parse(prompt) if name is not None]
    return {name + (f"!{how}" if how else "") + (f":{spec}" if spec else "") for name, spec, how in fields}


def load_settings(config: Path | None, flags: dict[str, Any]) -> Settings:
    """The settings of a TOML file with the fields in `flags` on top; descriptors are merged name by name.

    HdlError for anything that is not valid, unknown keys included.
    """
    described = read_toml(config, "says how to caption") if config else {}
    for name, value in flags.items():
        merged = isinstance(value, dict) and isinstance(described.get(name), dict)
        described[name] = described[name] | value if merged else value
    try:
        return Settings(**described)
    except ValidationError as error:
        where = f"{config}: " if config else "command line: "
        raise HdlError(where + "; ".join(explain(e) for e in error.errors())) from None


def explain(error: Any) -> str:
    name = ".".join(str(part) for part in error["loc"])
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"unknown option {name}{did_you_mean(name, Settings.model_fields)}"
    if not name:
        return message
    return f"{name}: {message} (found {error['input']!r})"
