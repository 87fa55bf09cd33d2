"""The fast path against the plain one: same model, same adapter, same batch."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor

from hdl.adapter.flat import by_name, trained_parameters
from hdl.adapter.lora import adapter_parameters, attach
from hdl.config import Lora
from hdl.kernels.fuse import cannot_fuse, fuse
from hdl.kernels.layer import KEPT
from hdl.kernels.quantize import Rowwise, empty_rows, quantize_rows, quantize_weight
from hdl.o1.config import O1Config
from hdl.o1.decoder import O1, References
from hdl.o1.layout import Seen, Segment, lay_out
from hdl.o1.patches import PATCH_DIM

GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if GPU else "cpu")
SMALL = O1Config(
    hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=32, rms_norm_eps=1e-6, rope_theta=5e6, mrope_section=(4, 2, 2),
)  # fmt: skip
# One decoder layer of the real model is 0.2 B parameters; two layers hand a gradient from one to the next.
REAL = replace(
    SMALL, hidden_size=4096, intermediate_size=12288, num_hidden_layers=2, num_attention_heads=32,
    num_key_value_heads=8, head_dim=128, mrope_section=(24, 20, 20),
)  # fmt: skip
UNEVEN = Lora(
    rank=4, alpha=6.0,
    rank_pattern={r"layers\.0\.self_attn\.[qk]_proj": 11, "up_proj": 3, r"layers\.2\..*": 1},
    alpha_pattern={"self_attn.v_proj": 2.0, r"layers\.1\.mlp\..*": 5.0, r"layers\.2\..*": 1.5},
)  # fmt: skip
MIXED = [Segment(5, 2, 3), Segment(9, 3, 1), Segment(2, 1, 1), Segment(5, 3, 2)]
EQUAL = [Segment(6, 2, 2), Segment(6, 2, 2)]


@pytest.fixture(autouse=True)
def kernels_or_formulas(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a CPU most cases take the kernels' plain formulas: the interpreter is slow, and one case shows that
    the kernels fit in just as well."""
    if "interpreted" not in request.keywords:
        monkeypatch.setenv("TRITON_INTERPRET", "0")


def adapted_model(
    config: O1Config, dtype: torch.dtype = torch.float32, lora: Lora | None = None, seed: int = 0
) -> PeftModel:
    """Random weights, drawn as networks are before training (what a branch adds to the residual stream
    shrinks with depth, as in GPT-2), and an adapter that does something."""
    with torch.device("meta"):
        model = O1(config)
    model = model.to_empty(device=DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    for name, p in model.named_parameters():
        if name.endswith("norm.weight"):
            p.data.uniform_(0.5, 1.5, generator=generator)
        else:
            branch_end = name.endswith(("o_proj.weight", "down_proj.weight"))
            scale = (2 * config.num_hidden_layers) ** -0.5 if branch_end else 1.0
            p.data.normal_(0, scale * p.shape[-1] ** -0.5, generator=generator)
    model = model.requires_grad_(False).to(dtype)
    adapted = attach(model, lora or Lora(rank=4, alpha=6.0), "base", seed)
    for name, p in adapter_parameters(adapted).items():
        scale = 0.2 if "lora_B" in name else 1.0  # a fifth of what the weights do
        p.data.normal_(0, scale * p.shape[-1] ** -0.5, generator=generator)
        p.data = p.data.to(dtype)
    return adapted


class Case:
    """A batch and what the loss wants of it."""

    def __init__(self, config: O1Config, segments: list[Segment], seed: int = 1) -> None:
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator).to(DEVICE)

        patches = sum(s.patches for s in segments)
        self.text = draw(sum(s.text for s in segments), config.hidden_size)
        self.z, self.want = draw(patches, PATCH_DIM), draw(patches, PATCH_DIM)
        self.t = torch.rand(len(segments), generator=generator).to(DEVICE)
        self.layout = lay_out(segments).to(DEVICE)

    def run(self, model: PeftModel) -> tuple[Tensor, dict[str, Tensor]]:
        """x_pred, and the gradient of every adapter parameter."""
        model.zero_grad()
        x_pred = model(self.text, self.z, self.t, self.layout)
        (x_pred.float() - self.want).square().mean().backward()
        return x_pred.detach(), gradients_of(model)


def gradients_of(model: PeftModel) -> dict[str, Tensor]:
    trained = trained_parameters(model)
    assert all(p.grad is not None for p in trained.values())
    gradients = by_name(model, {name: p.grad for name, p in trained.items()})  # type: ignore[misc]
    assert gradients.keys() == adapter_parameters(model).keys()
    return gradients


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


def worst(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(distance(a[name], b[name]) for name in a)


@pytest.mark.interpreted
@pytest.mark.parametrize("lora", [None, UNEVEN], ids=["alike", "ranks by layer"])
def test_the_kernels_themselves_equal_the_plain_path(lora: Lora | None) -> None:
    case = Case(SMALL, [Segment(3, 2, 1), Segment(4, 1, 2)])
    model, kept_less = adapted_model(SMALL, lora=lora), adapted_model(SMALL, lora=lora)
    x_pred, gradients = case.run(model)
    for fused, keep in ((model, "everything"), (kept_less, "products")):
        fuse(fused, keep=keep)
        fused_x_pred, fused_gradients = case.run(fused)
        assert distance(fused_x_pred, x_pred) < 1e-5
        assert worst(fused_gradients, gradients) < 1e-5


@pytest.mark.parametrize("keep", list(KEPT))
@pytest.mark.parametrize("segments", [MIXED, EQUAL], ids=["mixed", "equal"])
def test_float32_equals_the_plain_path(segments: list[Segment], keep: str) -> None:
    case = Case(SMALL, segments)
    model = adapted_model(SMALL)
    x_pred, gradients = case.run(model)
    fuse(model, keep=keep)
    fused_x_pred, fused_gradients = case.run(model)
    assert distance(fused_x_pred, x_pred) < 1e-5
    assert worst(fused_gradients, gradients) < 1e-5


def test_levels_can_differ_from_layer_to_layer() -> None:
    case = Case(SMALL, MIXED)
    model, mixed = adapted_model(SMALL), adapted_model(SMALL)
    fuse(model)
    fuse(mixed, keep=["input", "everything", "products"])
    (x_pred, gradients), (other_x_pred, other_gradients) = case.run(model), case.run(mixed)
    assert torch.equal(x_pred, other_x_pred)
    assert all(torch.equal(gradients[name], other_gradients[name]) for name in gradients)


@pytest.mark.parametrize("keep", ["everything", "input"])
def test_with_reference_images(keep: str) -> None:
    """What the visual tower adds after the first layers stands between two that hand gradients to each other."""
    segment = Segment(9, 2, 3, references=((2, 2),), seen=(Seen(2, 2, 2),))
    case = Case(SMALL, [segment, Segment(5, 2, 1)])
    drawn = torch.Generator().manual_seed(3)
    patches = torch.randn(4, PATCH_DIM, generator=drawn).to(DEVICE)
    deepstack = [torch.randn(4, SMALL.hidden_size, generator=drawn).to(DEVICE) for _ in range(2)]
    results = []
    for fused in (False, True):
        model = adapted_model(SMALL)
        if fused:
            fuse(model, keep=keep)
        references = References(patches, deepstack)
        x_pred = model(case.text, case.z, case.t, case.layout, references=references)
        (x_pred - case.want).square().mean().backward()
        results.append((x_pred.detach(), gradients_of(model)))
    (plain, gradients), (fused_x_pred, fused_gradients) = results
    assert distance(fused_x_pred, plain) < 1e-5 and worst(fused_gradients, gradients) < 1e-5


@pytest.mark.parametrize(
    "lora",
    [
        Lora(rank=4, alpha=1.0, targets=["q_proj", "down_proj"]),
        Lora(rank=3, alpha=2.0, rslora=True),
        Lora(rank=5, targets=["v_proj", "up_proj", "x_embedder.proj1"]),
        UNEVEN,
        UNEVEN.model_copy(update={"rslora": True}),
    ],
    ids=["some linears", "rslora", "outside the decoder too", "ranks by layer", "ranks by layer, rslora"],
)
def test_any_adapter_the_config_allows(lora: Lora) -> None:
    case = Case(SMALL, MIXED)
    model = adapted_model(SMALL, lora=lora)
    x_pred, gradients = case.run(model)
    fuse(model)
    fused_x_pred, fused_gradients = case.run(model)
    assert distance(fused_x_pred, x_pred) < 1e-5
    assert worst(fused_gradients, gradients) < 1e-5


def test_follows_the_adapter_as_it_changes_and_is_switched_off() -> None:
    case = Case(SMALL, EQUAL)
    model, plain = adapted_model(SMALL), adapted_model(SMALL)
    fuse(model)
    case.run(model)
    for m in (model, plain):
        for p in adapter_parameters(m).values():
            p.data.mul_(-0.5)
    assert distance(case.run(model)[0], case.run(plain)[0]) < 1e-5
    arguments = (case.text, case.z, case.t, case.layout)
    with torch.no_grad(), model.disable_adapter(), plain.disable_adapter():
        without = plain(*arguments)
        assert distance(model(*arguments), without) < 1e-5
    assert distance(case.run(model)[0], without) > 0.1


def test_gradients_accumulate_over_micro_batches() -> None:
    first, second = Case(SMALL, MIXED, seed=1), Case(SMALL, EQUAL, seed=2)
    model, plain = adapted_model(SMALL), adapted_model(SMALL)
    fuse(model)
    for m in (model, plain):
        m.zero_grad()
        for case in (first, second):
            x_pred = m(case.text, case.z, case.t, case.layout)
            (x_pred - case.want).square().mean().backward()
    assert worst(gradients_of(model), gradients_of(plain)) < 1e-5


def test_frozen_weights_are_stored_once() -> None:
    model = adapted_model(SMALL)
    fuse(model)
    attention = model.get_base_model().model.language_model.layers[1].self_attn  # type: ignore[union-attr,operator]
    storages = {
        p.base_layer.weight.untyped_storage().data_ptr()
        for p in (attention.q_proj, attention.k_proj, attention.v_proj)
    }
    assert len(storages) == 1


def rounded(weight: Tensor) -> Rowwise:
    rows = empty_rows(*weight.shape, weight.device)
    quantize_weight(weight, rows)
    return rows


def two_e4m3(x: Tensor) -> Tensor:
    hi = x.to(torch.float8_e4m3fn).float()
    return hi + (x - hi).to(torch.float8_e4m3fn).float()


def quantized_linear(module: LoraLinear, x: Tensor) -> Tensor:
    """PEFT's linear as the fp8 path defines it: its LoRA in sums of two e4m3 numbers, scaled like the frozen
    product's rows, and each rank by a power of two. Their rounding has no gradient."""
    weight = module.base_layer.weight
    a, b = module.lora_A["default"].weight, module.lora_B["default"].weight * module.scaling["default"]
    low = x @ a.t()
    sx, sw = quantize_rows(x.detach()).scale[:, None], rounded(weight).scale[:, None]
    c = torch.exp2(7 - (b / sw).abs().amax(0).log2().ceil())
    folded = two_e4m3(low / sx / c) * sx @ (two_e4m3(b / sw * c) * sw).t()
    lora = low @ b.t()
    return QuantizedProduct.apply(x, weight) + lora + (folded - lora).detach()


class QuantizedProduct(torch.autograd.Function):
    """x W^T as the fp8 path defines it: both operands of each product rounded to e4m3 first, x row by row, W
    by output channel, and dy row by row after W's scales are multiplied in."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        ctx.weight = rounded(weight)
        return quantize_rows(x).dequantize() @ ctx.weight.dequantize().t()

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def,override]
        scaled = quantize_rows(dy.contiguous(), column_scale=ctx.weight.scale)
        return scaled.dequantize() @ ctx.weight.values.float(), None


@pytest.mark.parametrize("lora", [None, UNEVEN], ids=["alike", "ranks by layer"])
def test_fp8_is_the_plain_path_with_rounded_operands(lora: Lora | None) -> None:
    case = Case(SMALL, MIXED)
    model, exact, quantized = (adapted_model(SMALL, lora=lora) for _ in range(3))
    exact_x_pred, _ = case.run(exact)
    for module in quantized.modules():
        if isinstance(module, LoraLinear):
            module.forward = partial(quantized_linear, module)  # type: ignore[method-assign]
    x_pred, gradients = case.run(quantized)
    fuse(model, weights="fp8")
    fp8_x_pred, fp8_gradients = case.run(model)
    assert 0.003 < distance(fp8_x_pred, exact_x_pred) < 0.08  # rounded indeed
    # Sums in another order turn a few roundings over, each worth an e4m3 step of one number in thousands.
    assert distance(fp8_x_pred, x_pred) < 2e-3
    # The gradients of q, k and v share a row and its scale on the fast path, and so do gate's and up's.
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(fp8_gradients[name].flatten(), gradient.flatten(), dim=0) > 0.995


@pytest.mark.skipif(not GPU, reason="no GPU")
def test_fp8_stays_near_bfloat16_at_the_real_shapes() -> None:
    case = Case(REAL, [Segment(160, 32, 32)])
    x_pred, gradients = case.run(adapted_model(REAL, torch.bfloat16))
    quantized = adapted_model(REAL, torch.bfloat16)
    fuse(quantized, weights="fp8")
    fp8_x_pred, fp8_gradients = case.run(quantized)
    assert distance(fp8_x_pred, x_pred) < 0.05
    for name, gradient in gradients.items():
        cosine = torch.cosine_similarity(fp8_gradients[name].flatten(), gradient.flatten(), dim=0)
        assert cosine > 0.99, f"{name}: {cosine}"


def test_says_what_it_cannot_fuse() -> None:
    model = adapted_model(SMALL, lora=Lora(rank=4, dropout=0.1))
    assert "lora.dropout" in str(cannot_fuse(model))
    with pytest.raises(ValueError, match=r"lora\.dropout"):
        fuse(model)
    with pytest.raises(ValueError, match="everything"):
        fuse(adapted_model(SMALL), keep="nothing")
    with pytest.raises(ValueError, match="list of 3"):
        fuse(adapted_model(SMALL), keep=["input"])


@pytest.mark.skipif(not GPU, reason="no GPU")
@pytest.mark.parametrize(
    "segments",
    [[Segment(160, 32, 32)], [Segment(77, 30, 34), Segment(20, 28, 36), Segment(400, 32, 32)]],
    ids=["1024x1", "mixed"],
)
@pytest.mark.parametrize("keep", list(KEPT))
def test_bfloat16_is_as_near_to_float32_as_the_plain_path(segments: list[Segment], keep: str) -> None:
    case = Case(REAL, segments)
    exact_x_pred, exact_gradients = case.run(adapted_model(REAL))
    model = adapted_model(REAL, torch.bfloat16)
    x_pred, gradients = case.run(model)
    fuse(model, keep=keep)
    fused_x_pred, fused_gradients = case.run(model)
    assert distance(fused_x_pred, exact_x_pred) <= 1.5 * distance(x_pred, exact_x_pred)
    for name, exact in exact_gradients.items():
        plain_error = distance(gradients[name], exact)
        assert distance(fused_gradients[name], exact) <= 1.5 * plain_error, name
