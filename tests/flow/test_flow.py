import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from hdl.config import Flow
from hdl.data.batches import pack
from hdl.data.samples import Sample
from hdl.flow.loss import X0Error, loss_weights, patch_errors, velocity
from hdl.flow.noise import VARIANTS, add_noise, clip_noise, noise_keys
from hdl.flow.sigma import draw_sigmas, shift_by_size, shift_sigma
from hdl.flow.step import flow_matching_loss
from hdl.kernels.noising import draw_noise
from hdl.o1.config import O1Config
from hdl.o1.decoder import O1, Head
from hdl.o1.patches import to_model

PLAIN = {"distribution": "uniform", "mean": 0.0, "std": 1.0, "shift": 1.0}


@pytest.fixture(autouse=True)
def kernels(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU the plain formulas, which are fast; one test shows that the kernels fit in their place."""
    if "interpreted" not in request.keywords:
        monkeypatch.setenv("TRITON_INTERPRET", "0")


def sigmas(count: int, step: int = 0, **settings: object) -> Tensor:
    return draw_sigmas(count, 7, step, **(PLAIN | settings))  # type: ignore[arg-type]


def test_uniform_sigmas_are_stratified_over_the_global_batch() -> None:
    for step in range(20):
        drawn = sigmas(16, step)
        assert (drawn * 16).long().sort().values.tolist() == list(range(16))
    assert not torch.equal(sigmas(16, 0), sigmas(16, 1))
    assert torch.equal(sigmas(16, 3), sigmas(16, 3))


def test_logit_normal_has_the_moments_asked_for() -> None:
    logits = torch.logit(sigmas(20000, distribution="logit_normal", mean=0.5, std=1.5).double())
    assert abs(float(logits.mean()) - 0.5) < 0.01
    assert abs(float(logits.std()) - 1.5) < 0.01


def test_shift_is_the_models_own_formula() -> None:
    plain, shifted = sigmas(64), sigmas(64, shift=3.0)
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain))
    assert float(shift_sigma(torch.tensor(0.5), 3.0)) == pytest.approx(0.75)


def test_larger_pictures_are_shifted_by_the_root_of_their_size() -> None:
    """Esser et al. eq. 23: sqrt(m/n) t / (1 + (sqrt(m/n) - 1) t), here on top of a shift of 3."""
    patches = [64, 256, 16, 64]  # of a picture of 256x256 pixels, of 4 times and a quarter as many
    plain = sigmas(4)
    by_size = sigmas(4, shift=shift_by_size(3.0, 256, patches))
    once = 3 * plain / (1 + 2 * plain)
    for level, expected, root in zip(by_size, once, (1.0, 2.0, 0.5, 1.0)):
        assert float(level) == pytest.approx(float(root * expected / (1 + (root - 1) * expected)), rel=1e-5)
    assert shift_by_size(3.0, None, patches) == 3.0


def test_sigma_is_never_zero_or_one() -> None:
    drawn = sigmas(100_000, distribution="logit_normal", std=20.0)
    assert drawn.min() > 0 and drawn.max() < 1


def test_noise_belongs_to_a_place_not_to_a_pack() -> None:
    keys = noise_keys([0, 1, 2], seed=5, step=9)
    together = draw_noise([4, 2, 3], keys)
    apart = [draw_noise([n], noise_keys([p], seed=5, step=9)) for n, p in [(4, 0), (2, 1), (3, 2)]]
    assert torch.equal(together, torch.cat(apart))
    assert not torch.equal(together[:2], together[4:6])
    others = [noise_keys([0], 5, 10)[0], noise_keys([0], 6, 9)[0], noise_keys([0, 9, 90], 5, 0)[2]]
    assert len({*keys, *others}) == 6


def test_dev_clips_noise_at_its_own_deviation() -> None:
    eps = torch.randn(50, 3072) * 3
    clipped = clip_noise(eps, 2.5)
    assert float(clipped.abs().max()) == pytest.approx(2.5 * float(eps.std()), rel=1e-5)
    inside = eps.abs() < 2.5 * eps.std()
    assert torch.equal(clipped[inside], eps[inside])
    assert torch.equal(clip_noise(eps, None), eps)
    assert VARIANTS["full"].noise_scale == 8.0 and VARIANTS["dev"].noise_scale == 7.5


def test_velocity_weighting_is_the_velocity_loss() -> None:
    x0, eps, x_pred = (torch.randn(6, 3072, dtype=torch.float64) for _ in range(3))
    sigma = torch.tensor([0.05, 0.2, 0.4, 0.6, 0.8, 0.99], dtype=torch.float64)
    z = add_noise(x0, eps, sigma, 8.0)
    true_velocity = x0 - 8.0 * eps
    predicted = torch.stack([velocity(x_pred[i], z[i], float(sigma[i])) for i in range(6)])
    velocity_loss = (predicted - true_velocity).square().mean(-1)
    weighted = patch_errors(x_pred, x0) * loss_weights(sigma.float(), "velocity", 8.0, 5.0)
    assert torch.allclose(weighted.double(), velocity_loss, rtol=1e-4)


@pytest.mark.parametrize(("noise_scale", "gamma"), [(8.0, 5.0), (7.5, 0.5)])
def test_min_snr_weights_are_the_papers_over_gamma(noise_scale: float, gamma: float) -> None:
    sigma = torch.tensor([1e-4, 0.01, 0.1, 0.5, 0.9])
    weights = loss_weights(sigma, "min_snr", noise_scale, gamma).tolist()
    ratios = [((1 - s) / (s * noise_scale)) ** 2 for s in sigma.tolist()]
    assert ratios[0] > gamma > ratios[-1]  # both sides of the minimum
    assert weights == pytest.approx([min(r, gamma) / gamma for r in ratios], rel=1e-5)
    edge = torch.tensor([1 / (1 + noise_scale * gamma**0.5)])
    assert float(loss_weights(edge, "min_snr", noise_scale, gamma)) == pytest.approx(1.0)


def batch_of(grids: list[tuple[int, int]], places: list[int], global_patches: int):  # type: ignore[no-untyped-def]
    samples = []
    for place, (rows, cols) in zip(places, grids):
        pixels = torch.Generator().manual_seed(place)
        samples.append(
            Sample(
                key=f"s{place}",
                patches=torch.randint(0, 256, (rows * cols, 3072), generator=pixels, dtype=torch.uint8),
                rows=rows,
                cols=cols,
                input_ids=torch.zeros(4, dtype=torch.int64),
                text_embeds=torch.zeros(4, 8, dtype=torch.bfloat16),
                caption="",
            )
        )
    return pack(samples, places, global_patches)


def test_parts_of_a_step_add_up_to_the_mean_over_its_patches() -> None:
    """However a global batch is cut into micro-batches and ranks, the loss is the same."""
    grids, levels = [(2, 2), (1, 3), (4, 1), (1, 1)], torch.tensor([0.1, 0.4, 0.6, 0.9])
    patches = sum(r * c for r, c in grids)

    def half(text: Tensor, z: Tensor, t: Tensor, layout: object) -> Tensor:
        return 0.5 * z

    def loss_of(places: list[int]) -> tuple[Tensor, Tensor]:
        batch = batch_of([grids[p] for p in places], places, patches)
        return flow_matching_loss(half, batch, levels, 3, variant=VARIANTS["full"], flow=Flow(), seed=1)

    whole, errors = loss_of([0, 1, 2, 3])
    parts = [loss_of([0, 1]), loss_of([2]), loss_of([3])]
    assert float(sum(loss for loss, _ in parts)) == pytest.approx(float(whole), rel=1e-6)
    assert torch.allclose(torch.cat([e for _, e in parts]), errors, rtol=1e-6)

    batch = batch_of(grids, [0, 1, 2, 3], patches)
    eps = draw_noise(batch.patch_counts, noise_keys(batch.places, seed=1, step=3))
    sigma = levels.repeat_interleave(torch.tensor(batch.patch_counts))
    x0 = to_model(batch.patches)
    by_hand = (0.5 * ((1 - sigma)[:, None] * x0 + 8 * sigma[:, None] * eps) - x0).square().mean()
    assert float(whole) == pytest.approx(float(by_hand), rel=1e-6)
    assert math.isfinite(float(whole))


TINY = O1Config(
    hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, vocab_size=32, rms_norm_eps=1e-6, rope_theta=5e6, mrope_section=(4, 2, 2),
)  # fmt: skip


def tiny_model() -> O1:
    torch.manual_seed(0)
    return O1(TINY).requires_grad_(False)


@pytest.mark.interpreted
@pytest.mark.parametrize("variant", ["full", "dev"])
@pytest.mark.parametrize("weighting", ["x0", "velocity", "min_snr"])
def test_a_loss_taken_at_the_head_is_the_loss(variant: str, weighting: str) -> None:
    model, batch = tiny_model(), batch_of([(1, 2), (1, 1)], [0, 1], 3)
    trained = model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_()
    batch = replace(batch, text=torch.randn(8, 32))
    losses, samples, gradients = [], [], []
    for fused in (False, True):
        loss, errors = flow_matching_loss(
            model, batch, torch.tensor([0.3, 0.8]), 3,
            variant=VARIANTS[variant], flow=Flow(weighting=weighting), seed=1, fused=fused,
        )  # fmt: skip
        losses.append(loss.detach())
        samples.append(errors)
        gradients.append(torch.autograd.grad(loss, trained)[0])
    assert float(losses[1]) == pytest.approx(float(losses[0]), rel=1e-5)
    assert torch.allclose(samples[1], samples[0], rtol=1e-5)
    assert (gradients[1] - gradients[0]).norm() < 1e-5 * gradients[0].norm()


def test_the_model_is_noised_in_its_own_dtype() -> None:
    seen = []

    def half(text: Tensor, z: Tensor, t: Tensor, layout: object) -> Tensor:
        seen.append(z)
        return 0.5 * z

    batch = batch_of([(1, 1)], [0], 1)
    for settings in ({}, {"dtype": torch.bfloat16}):
        flow_matching_loss(
            half, batch, torch.tensor([0.5]), 3, variant=VARIANTS["full"], flow=Flow(), seed=1, **settings
        )  # type: ignore[arg-type]
    assert seen[0].dtype == torch.float32
    assert torch.equal(seen[1], seen[0].bfloat16())


def test_a_weight_that_is_elsewhere_is_fetched_by_its_module() -> None:
    """ZeRO-3 leaves an empty weight behind, and fills it in for the time of the module's own call."""
    head = Head(TINY).requires_grad_(False)
    hidden, pixels = torch.randn(2, 32), torch.randint(0, 256, (2, 3072), dtype=torch.uint8)
    expected = X0Error(pixels)(hidden, head)
    assert torch.allclose(expected, patch_errors(head(hidden), to_model(pixels)), rtol=1e-5)

    weight, whole = head.linear.weight, head.linear.weight.data
    weight.ds_id = 1  # type: ignore[attr-defined]

    def put(value: Tensor) -> None:
        weight.data = value

    head.linear.register_forward_pre_hook(lambda *_: put(whole))
    head.linear.register_forward_hook(lambda *_: put(torch.empty(0)))
    for before in (torch.empty(0), torch.zeros_like(whole)):  # not asked for yet; on its way
        put(before)
        assert torch.allclose(X0Error(pixels)(hidden, head), expected, rtol=1e-5)
