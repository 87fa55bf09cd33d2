"""Holding hdl to the model's own numbers.

A golden folder has an `index.json` that lists cases, a small checkpoint `o1-tiny`, and the numbers that
the model's own code gave for each case (float32 on a CPU). Every case is computed again here and compared:

    t2i      token ids, positions and types; x_pred of one forward pass
    train    the noised image, x_pred, the loss and its gradient for some weights
    sample   the timesteps, the first x_pred and the final picture
    edit     the same with reference images: their sizes, tokens, positions and pixels
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from hdl.errors import HdlError
from hdl.flow.loss import patch_errors
from hdl.flow.noise import add_noise, clip_noise
from hdl.o1.checkpoint import load_model, open_checkpoint
from hdl.o1.decoder import O1
from hdl.o1.layout import Segment, lay_out
from hdl.o1.patches import PATCH, patchify, to_model, to_pixels, unpatchify
from hdl.o1.prompt import UNCONDITIONAL_PROMPT, PromptEncoder
from hdl.o1.visual import VisualTower
from hdl.sample.generate import Pack, Request, Shown, denoise, initial_generator, initial_noise, is_guided
from hdl.sample.grid import as_tensor
from hdl.sample.references import edit_request, read_reference
from hdl.sample.schedulers import Flash, FlowMatchEuler, Scheduler, UniPC

X_PRED_BOUND = 1e-5  # relative, of norms
LOSS_BOUND = 1e-6  # relative
GRADIENT_BOUND = 1e-4  # relative, of norms
PIXEL_BOUND = 1  # of 255, anywhere in the picture
EXACT = 0.0
GRADIENT = "grad."


@dataclass(frozen=True)
class Check:
    """One comparison; `error` is inf where shapes differ or a number is not finite."""

    case: str
    what: str
    error: float
    bound: float

    @property
    def passed(self) -> bool:
        return self.error <= self.bound


@dataclass(frozen=True)
class Golden:
    """A golden folder's model and prompts."""

    folder: Path
    model: O1
    encoder: PromptEncoder

    def text(self, prompt: str) -> Tensor:
        return self.encoder.embed(self.encoder.ids(prompt)).float()


def open_golden(folder: Path) -> tuple[Golden, list[dict[str, Any]]]:
    """The golden folder and its cases."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        cases: list[dict[str, Any]] = index["cases"]
        special_tokens: dict[str, int] = index["special_tokens"]
    except (OSError, ValueError, KeyError) as error:
        raise HdlError(f"{folder}: not a golden folder, its index.json does not read ({error})") from None
    checkpoint = open_checkpoint(folder / "o1-tiny")
    encoder = PromptEncoder(checkpoint)
    found = {token: encoder.tokenizer.convert_tokens_to_ids(token) for token in special_tokens}
    if found != special_tokens:
        raise HdlError(
            f"{folder}: its tokenizer's special tokens {found} are not index.json's {special_tokens}"
        )
    return Golden(folder, load_model(checkpoint, "cpu", torch.float32), encoder), cases


def check_case(golden: Golden, case: dict[str, Any]) -> list[Check]:
    """All comparisons of a case."""
    kinds = {"t2i": _check_t2i, "train": _check_train, "sample": _check_sample, "edit": _check_edit}
    check = kinds.get(case["kind"])
    if check is None:
        raise HdlError(
            f"{golden.folder / case['file']}: unknown kind {case['kind']!r}; expected {', '.join(kinds)}"
        )
    try:
        return check(golden, case, load_file(golden.folder / case["file"]))
    except KeyError as error:
        raise HdlError(f"{golden.folder / case['file']}: the case lacks {error}") from None


def _check_tokens(golden: Golden, case: dict[str, Any], stored: dict[str, Tensor]) -> list[Check]:
    ids = golden.encoder.ids(case["prompt"])
    layout = lay_out([_segment(case, len(ids))])
    types = layout.token_types()
    is_patch = torch.zeros_like(types)
    is_patch[layout.patch_index] = 1
    computed = {
        "input_ids": torch.tensor(ids),
        "position_ids": layout.positions,
        "token_types": types,
        "vinput_mask": is_patch,
    }
    return [
        Check(case["file"], name, _unequal(value, stored[name]), EXACT)
        for name, value in computed.items()
        if name in stored
    ]


def _check_t2i(golden: Golden, case: dict[str, Any], stored: dict[str, Tensor]) -> list[Check]:
    with torch.no_grad():
        x_pred = _forward(golden, case, stored["z"])
    tokens = _check_tokens(golden, case, stored)
    return [*tokens, Check(case["file"], "x_pred", _relative(x_pred, stored["x_pred"]), X_PRED_BOUND)]


def _check_train(golden: Golden, case: dict[str, Any], stored: dict[str, Tensor]) -> list[Check]:
    image = as_tensor(Image.open(golden.folder / case["image"]))
    x0 = to_model(patchify(image))
    sigma = torch.full((len(x0),), float(case["sigma"]))
    z = add_noise(x0, stored["eps"], sigma, case["noise_scale"])
    weights = {n.removeprefix(GRADIENT): g for n, g in stored.items() if n.startswith(GRADIENT)}
    parameters = dict(golden.model.named_parameters())
    trained = [parameters[name].requires_grad_() for name in weights]
    x_pred = _forward(golden, case, z)
    loss = patch_errors(x_pred, x0).mean()
    gradients = torch.autograd.grad(loss, trained)
    golden.model.requires_grad_(False)
    checks = [
        Check(case["file"], "x0", _relative(x0, stored["x0"]), X_PRED_BOUND),
        Check(case["file"], "z", _relative(z, stored["z"]), X_PRED_BOUND),
        Check(case["file"], "x_pred", _relative(x_pred.detach(), stored["x_pred"]), X_PRED_BOUND),
        Check(case["file"], "loss", _relative(loss.detach(), torch.tensor(case["loss"])), LOSS_BOUND),
    ]
    for (name, expected), gradient in zip(weights.items(), gradients):
        short = name.removeprefix("model.language_model.").removesuffix(".weight")
        checks.append(Check(case["file"], f"grad {short}", _relative(gradient, expected), GRADIENT_BOUND))
    return checks


def _check_sample(golden: Golden, case: dict[str, Any], stored: dict[str, Tensor]) -> list[Check]:
    request = Request(golden.text(case["prompt"]), case["height"], case["width"], case["seed"])
    z = initial_noise(request, initial_generator(request), case["noise_scale"])
    tokens = _check_tokens(golden, case, stored)
    drawn = [*tokens, Check(case["file"], "z_init", _relative(z, stored["z_init"]), X_PRED_BOUND)]
    for once in (True, False):  # the text read once, and in every step
        drawn += _check_drawing(golden, case, stored, request, z, once)
    return drawn


def _check_edit(golden: Golden, case: dict[str, Any], stored: dict[str, Tensor]) -> list[Check]:
    files = [golden.folder / name for name in case["refs"]]
    tower = VisualTower(golden.encoder.checkpoint, "cpu", torch.float32)
    images = [read_reference(file) for file in files]
    request = edit_request(
        tower, golden.encoder, case["prompt"], images, case["height"], case["width"], case["seed"]
    )
    shown = request.shown
    assert shown is not None
    layout = lay_out([_segment(case, len(request.text), shown)])
    ids = golden.encoder.ids(case["prompt"], [(seen.rows, seen.cols) for seen in shown.seen])
    z = initial_noise(request, initial_generator(request), case["noise_scale"])
    exact = {
        "input_ids": torch.tensor(ids),
        "position_ids": layout.positions,
        "token_types": layout.token_types(),
    }
    checks = [
        Check(case["file"], name, _unequal(value, stored[name]), EXACT) for name, value in exact.items()
    ]
    first_z = torch.cat([z, shown.patches])
    checks.append(Check(case["file"], "z_init", _relative(first_z, stored["z_init"]), X_PRED_BOUND))
    for once in (True, False):
        checks += _check_drawing(golden, case, stored, request, z, once)
    return checks


def _check_drawing(
    golden: Golden, case: dict[str, Any], stored: dict[str, Tensor], request: Request, z: Tensor, once: bool
) -> list[Check]:
    scheduler, guidance = _scheduler(case), float(case["guidance_scale"])
    empty = golden.text(UNCONDITIONAL_PROMPT)
    pack = Pack.of(golden.model, [request], empty, is_guided(guidance), "cpu", read_once=once)
    calls: list[tuple[float, Tensor]] = []

    def watched(z: Tensor, t: Tensor) -> Tensor:
        x_pred = pack.predict(z, t)
        calls.append((float(t[0]), x_pred[: request.patches]))
        return x_pred

    noise = stored.get("step_noise")
    final = denoise(
        replace(pack, predict=watched), z, scheduler, guidance,
        lambda i: z if noise is None else clip_noise(noise[i], case.get("noise_clip_std")),
    )  # fmt: skip
    # With guidance the golden model was called twice a step; here both halves go through in one call.
    per_step = len(stored["timesteps"]) // len(scheduler.timesteps)
    times = torch.tensor([t for t, _ in calls]).repeat_interleave(per_step)
    picture = unpatchify(to_pixels(final), case["height"] // PATCH, case["width"] // PATCH)
    how = "text read once" if once else "text in every step"
    return [
        Check(case["file"], f"timesteps, {how}", _relative(times, stored["timesteps"]), X_PRED_BOUND),
        Check(
            case["file"], f"x_pred_first, {how}", _relative(calls[0][1], stored["x_pred_first"]), X_PRED_BOUND
        ),
        Check(case["file"], f"picture (of 255), {how}", _furthest(picture, stored["image"]), PIXEL_BOUND),
    ]


def _scheduler(case: dict[str, Any]) -> Scheduler:
    if case["scheduler"] == "unipc":
        return UniPC(case["steps"], case["shift"])
    if case["scheduler"] == "flash":
        return Flash(case["noise_scale"])
    if case["scheduler"] == "flow_match_euler":
        even = torch.linspace(1000, 1, case["steps"]).int().tolist()  # where a case lists none
        return FlowMatchEuler(case.get("timesteps", even))
    raise HdlError(f"{case['file']}: unknown scheduler {case['scheduler']!r}")


def _forward(golden: Golden, case: dict[str, Any], z: Tensor) -> Tensor:
    text = golden.text(case["prompt"])
    layout = lay_out([_segment(case, len(text))])
    return golden.model(text, z, torch.tensor([1.0 - case["sigma"]]), layout)


def _segment(case: dict[str, Any], text: int, shown: Shown | None = None) -> Segment:
    grids, seen = (shown.grids, shown.seen) if shown else ((), ())
    return Segment(text, case["height"] // PATCH, case["width"] // PATCH, grids, seen)


def _relative(computed: Tensor, expected: Tensor) -> float:
    if computed.shape != expected.shape and computed.numel() != expected.numel():
        return float("inf")
    difference = (computed.flatten().double() - expected.flatten().double()).norm()
    error = float(difference / expected.double().norm().clamp(min=1e-30))
    return error if error == error else float("inf")  # NaN passes no bound


def _unequal(computed: Tensor, expected: Tensor) -> float:
    """How many entries differ; the model's own code keeps a batch dimension of one in some cases."""
    if computed.numel() != expected.numel():
        return float("inf")
    expected = expected.view(computed.shape)
    return float((computed.long() != expected.long()).sum())


def _furthest(computed: Tensor, expected: Tensor) -> float:
    if computed.shape != expected.shape:
        return float("inf")
    return float((computed.int() - expected.int()).abs().max())
