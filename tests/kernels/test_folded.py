"""The LoRA side as columns of e4m3, against the product of what was folded, in float64."""

from collections.abc import Callable

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

from hdl.kernels import folded
from hdl.kernels.adapter_copies import AdapterCopies
from hdl.kernels.folded import Fold, Folds, fold_low, folded_width
from hdl.kernels.linears import Buffer, Fp8Linear
from hdl.kernels.quantize import Rowwise, quantize_rows
from tests.kernels.helpers import DEVICE, DTYPES, RowsSlice, distance, draw

K, WIDTHS, TOKENS = 48, {"q": 96, "k": 16, "v": 144}, 37
BFLOAT16_LIKE = 2.0**-8
# A matrix [N, R], and whether it is A^T, stored [R, N].
MATRICES = [(1, 8, False), (48, 8, True), (136, 40, False), (264, 96, True), (300, 24, False)]

pytestmark = pytest.mark.usefixtures("path")
over_matrices = pytest.mark.parametrize("matrix", MATRICES, ids=str)
over_dtypes = pytest.mark.parametrize("dtype", DTYPES)


def fold_of(N: int, R: int, across: bool, dtype: torch.dtype) -> tuple[Fold, RowsSlice]:
    """Ranks of very different size, the last one all zero; and what its columns are part of."""
    numbers = draw(N, R, dtype=dtype) * torch.logspace(-6, 2, R, device=DEVICE).to(dtype)
    numbers[:, -1] = 0.0
    matrix = numbers.t().contiguous().t() if across else numbers
    room = RowsSlice(N, folded_width(R))
    scale = torch.ones(N, device=DEVICE) if across else draw(N, seed=1).exp() * 1e-3
    return Fold(matrix, scale, room.rows.values, torch.full((R,), torch.nan, device=DEVICE)), room


def parts_of(columns: Tensor, R: int) -> tuple[Tensor, ...]:
    return columns[:, : 4 * R].double().split(R, dim=1)


def assert_two_halves(hi: Tensor, lo: Tensor, exact: Tensor) -> None:
    """8 significant bits, of numbers that are large enough for e4m3's to be normal."""
    assert (lo.abs() <= torch.maximum(hi.abs() / 16, torch.tensor(2.0**-9))).all()
    assert ((hi + lo - exact).abs() <= torch.maximum(exact.abs() * 2.0**-8, torch.tensor(2.0**-10))).all()


@over_dtypes
@over_matrices
def test_weights_are_folded(matrix: tuple[int, int, bool], dtype: torch.dtype) -> None:
    R = matrix[1]
    fold, room = fold_of(*matrix, dtype)
    other, _ = fold_of(16, 8, False, dtype)  # a model has many
    Folds([other, fold]).refresh()
    room.assert_untouched_beside()
    assert (fold.columns[:, 4 * R :].view(torch.uint8) == 0x7F).all()  # the padding stays
    scaled = fold.matrix.double() / fold.scale.double()[:, None]
    peak = scaled.abs().amax(0)[:-1] / fold.factors.double()[:-1]
    assert (peak > 64 * (1 - 1e-6)).all() and (peak <= 128 * (1 + 1e-6)).all()
    assert (torch.frexp(fold.factors)[0] == 0.5).all()  # a power of two
    assert fold.factors[-1] == 1.0
    hi, hi_again, lo, lo_again = parts_of(fold.columns, R)
    assert torch.equal(hi, hi_again) and torch.equal(lo, lo_again)
    assert_two_halves(hi, lo, scaled / fold.factors.double())


@over_dtypes
@pytest.mark.parametrize("shape", [(1, 8), (37, 32), (70, 40), (33, 96)], ids=str)
def test_activations_are_folded(shape: tuple[int, int], dtype: torch.dtype) -> None:
    S, R = shape
    wide = torch.full((S, R + 16), torch.nan, dtype=dtype, device=DEVICE)
    low = wide[:, 8 : 8 + R]
    low.copy_(draw(S, R))
    factors = torch.exp2(-2.0 - torch.arange(R, device=DEVICE) % 9)
    room = RowsSlice(S, 16 + folded_width(R))
    room.rows.scale.copy_(draw(S, seed=1).exp() * 0.02)
    fold_low(low, factors, room.rows)
    room.assert_untouched_beside()
    assert (room.rows.values[:, :16].view(torch.uint8) == 0x7F).all()
    columns = room.rows.values[:, 16:]
    assert (columns[:, 4 * R :].float() == 0).all()
    hi, lo, hi_again, lo_again = parts_of(columns, R)
    assert torch.equal(hi, hi_again) and torch.equal(lo, lo_again)
    assert_two_halves(hi, lo, low.double() / room.rows.scale.double()[:, None] * factors.double())


@over_matrices
def test_kernel_and_formula_agree(matrix: tuple[int, int, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    N, R, _ = matrix
    results = []
    for plain in (False, True):
        if plain:
            monkeypatch.setattr(folded, "runs_triton", lambda tensor: False)
        fold, _ = fold_of(*matrix, torch.bfloat16)
        Folds([fold]).refresh()
        rows = Rowwise(torch.zeros_like(fold.columns), draw(N, seed=1).exp() * 0.02)
        fold_low(draw(N, R, dtype=torch.bfloat16), torch.ones(R, device=DEVICE), rows)
        results.append([fold.factors, fold.columns[:, : 4 * R].float(), rows.values.float()])
    for kernel, formula in zip(*results):
        if DEVICE.type == "cpu":
            assert torch.equal(kernel, formula)
        else:  # a division may differ in its last bit: an e4m3 step of a number in thousands
            off = (kernel - formula).abs() > kernel.abs() / 15
            assert off.sum() <= off.numel() / 1000


@pytest.mark.parametrize("size", [448.0, 500.0, 800.0, 2000.0])
def test_large_numbers_saturate_at_twice_the_largest(size: float) -> None:
    low = torch.full((2, 8), size, device=DEVICE)
    rows = Rowwise(
        torch.zeros(2, folded_width(8), device=DEVICE).to(torch.float8_e4m3fn), torch.ones(2, device=DEVICE)
    )
    fold_low(low, torch.ones(8, device=DEVICE), rows)
    hi, lo, _, _ = parts_of(rows.values, 8)
    torch.testing.assert_close(hi + lo, low.double().clamp(max=896), rtol=BFLOAT16_LIKE, atol=0.0)


@pytest.mark.parametrize("broken", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_stays_so(broken: float) -> None:
    fold, _ = fold_of(136, 40, False, torch.float32)
    fold.matrix[5, 3] = broken
    Folds([fold]).refresh()
    assert fold.columns[5, 3].float().isnan() and fold.factors.isfinite().all()
    low = draw(2, 8)
    low[1, 3] = broken
    rows = Rowwise(torch.zeros(2, 128, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(2, device=DEVICE))
    fold_low(low, torch.ones(8, device=DEVICE), rows)
    assert rows.values[1, 3].float().isnan() and rows.values[0].float().isfinite().all()


def test_what_does_not_fit_is_refused() -> None:
    rows = Rowwise(torch.zeros(2, 128, device=DEVICE).to(torch.float8_e4m3fn), torch.ones(2, device=DEVICE))
    with pytest.raises(ValueError, match=r"factors is .*\[7\]"):
        fold_low(draw(2, 8), torch.ones(7, device=DEVICE), rows)
    with pytest.raises(ValueError, match=r"rows.values is .*\[2, 128\], expected .*\[3, 128\]"):
        fold_low(draw(3, 8), torch.ones(8, device=DEVICE), rows)
    with pytest.raises(ValueError, match="low has strides"):
        fold_low(draw(8, 2).t(), torch.ones(8, device=DEVICE), rows)


class Pack:
    """Linears with an adapter on some of them, packed; A and B of about `a` and `b` times W's size."""

    def __init__(self, targets: str, rank: int, a: float = 0.5, b: float = 0.5) -> None:
        torch.manual_seed(0)
        model = nn.ModuleDict({name: nn.Linear(K, n, bias=False) for name, n in WIDTHS.items()})
        for name in WIDTHS:
            nn.init.normal_(model[name].weight, 0, K**-0.5)  # type: ignore[arg-type]
        with torch.no_grad():
            model["q"].weight[3] = 0.0  # type: ignore[index,operator]
        self.adapted: nn.Module | None = None
        if targets:
            self.adapted = get_peft_model(
                model,  # type: ignore[arg-type]
                LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(targets)),
            )
            for name, p in model.named_parameters():
                if "lora_" in name:
                    nn.init.normal_(p, 0, K**-0.5 * (a if "lora_A" in name else b))
        self.modules = [model[name].to(DEVICE) for name in WIDTHS]
        self.linear = Fp8Linear(self.modules)
        self.copies = AdapterCopies([self.linear])
        self.copies.refresh()

    @property
    def lora(self) -> Tensor:
        """s B A of all members under one another, float64 [N, K], as PEFT has it now."""
        deltas = []
        for module, n in zip(self.modules, WIDTHS.values()):
            if hasattr(module, "lora_A") and not module.disable_adapters:
                a, b = (x["default"].weight.detach().double() for x in (module.lora_A, module.lora_B))  # type: ignore[index,operator,union-attr]
                deltas.append(b @ a * module.scaling["default"])  # type: ignore[index]
            else:
                deltas.append(torch.zeros(n, K, dtype=torch.float64, device=DEVICE))
        return torch.cat(deltas)

    def forward(self, x: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
        """The frozen part of the product (0 without `frozen`), float64, and the whole."""
        buffer = filled(self.linear.input_buffer(len(x)), x)
        self.linear.lower_input(buffer)
        return self._run(buffer, self.linear.weight, self.linear.forward, frozen)

    def backward(self, dy: Tensor, frozen: bool) -> tuple[Tensor, Tensor]:
        buffer = filled(self.linear.gradient_buffer(len(dy)), dy, self.linear.gradient_scale)
        self.linear.lower_gradient(buffer)
        return self._run(buffer, self.linear.transposed, self.linear.backward, frozen)

    def _run(
        self, buffer: Buffer, weight: Rowwise, run: Callable[[Buffer], Tensor], frozen: bool
    ) -> tuple[Tensor, Tensor]:
        rows = buffer.rows
        assert rows is not None
        if not frozen:
            rows.values.zero_()
        exact = rows.dequantize().double() @ weight.columns(0, buffer.width).dequantize().double().t()
        return exact, run(buffer)


def filled(buffer: Buffer, values: Tensor, column_scale: Tensor | None = None) -> Buffer:
    assert buffer.wide_rows is not None
    buffer.wide.fill_(torch.nan)  # what is not written must not be read
    buffer.wide_rows.values.view(torch.uint8).fill_(0x7F)
    buffer.values.copy_(values)
    quantize_rows(values, column_scale, buffer.rows)
    return buffer


def assert_follows(pack: Pack, frozen: bool, bound: float = BFLOAT16_LIKE) -> None:
    x, dy = draw(TOKENS, K, seed=1), draw(TOKENS, sum(WIDTHS.values()), seed=2)
    exact, y = pack.forward(x, frozen)
    assert distance(y.double() - exact, x.double() @ pack.lora.t()) <= bound
    exact, dx = pack.backward(dy, frozen)
    assert distance(dx.double() - exact, dy.double() @ pack.lora) <= bound


@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("rank", [4, 8, 32])
@pytest.mark.parametrize("targets", ["qkv", "k", "qv"])
def test_the_lora_part_is_as_exact_as_in_bfloat16(targets: str, rank: int, frozen: bool) -> None:
    assert_follows(Pack(targets, rank, a=0.5, b=0.1), frozen)


@pytest.mark.parametrize("b", [1.0, 1e-1, 1e-2, 1e-3, 1e-4, 1e-5])
def test_over_decades(b: float) -> None:
    """A as large as B is small, that is a LoRA of a hundredth of the frozen weights: c makes up for it."""
    assert_follows(Pack("qkv", 8, a=1e-2 / b, b=b), frozen=False)


@pytest.mark.parametrize("b", [1e-3, 1e-4, 1e-5, 1e-6])
def test_a_small_lora_is_off_by_little_of_the_frozen_product(b: float) -> None:
    pack = Pack("qkv", 8, a=1.0, b=b)
    x, dy = draw(TOKENS, K, seed=1), draw(TOKENS, sum(WIDTHS.values()), seed=2)
    for values, run, lora in ((x, pack.forward, pack.lora.t()), (dy, pack.backward, pack.lora)):
        frozen, whole = run(values, True)
        wanted = values.double() @ lora
        off = float((whole.double() - frozen - wanted).norm())
        assert off <= BFLOAT16_LIKE * float(wanted.norm()) + 3e-5 * float(frozen.norm())


def test_without_an_adapter() -> None:
    pack = Pack("", 8)
    assert pack.linear.folds() == [] and pack.linear.weight.values.shape == (sum(WIDTHS.values()), K)
    for values, run in (
        (draw(3, K), pack.forward),
        (draw(3, sum(WIDTHS.values())), pack.backward),
    ):
        frozen, whole = run(values, True)
        assert distance(whole, frozen) <= 1e-6


def test_b_of_zeros_adds_nothing() -> None:
    pack = Pack("qkv", 4, b=0.0)
    for values, run in (
        (draw(3, K), pack.forward),
        (draw(3, sum(WIDTHS.values())), pack.backward),
    ):
        assert not run(values, False)[1].any()


def test_an_activation_without_rows_is_lowered_all_the_same() -> None:
    linear = Pack("qkv", 4).linear
    whole = filled(linear.input_buffer(3), draw(3, K))
    alone = Buffer(whole.wide.clone(), whole.width, None)
    linear.lower_input(whole)
    linear.lower_input(alone)
    assert torch.equal(whole.low, alone.low) and alone.rows is None


def test_follows_the_adapter() -> None:
    pack = Pack("qv", 4, a=0.5, b=0.05)
    places = [t.data_ptr() for f in pack.linear.folds() for t in (f.matrix, f.columns, f.factors)]
    q, v = pack.modules[0], pack.modules[2]
    before = pack.lora
    with torch.no_grad():
        for p in pack.linear.parameters():
            p.mul_(-3.0)
    pack.copies.refresh()
    assert distance(pack.lora, before) > 1
    assert_follows(pack, frozen=False)
    with torch.no_grad():
        for p in pack.linear.parameters():
            p.div_(32.0)
    pack.copies.refresh()
    for fold in pack.linear.folds():
        assert (parts_of(fold.columns, 8)[0].abs().amax(0) >= 64).all()  # c follows down as well
    with torch.no_grad():
        for p in pack.linear.parameters():
            p.mul_(32.0)
    pack.copies.refresh()
    v.scaling["default"] *= 0.1  # type: ignore[operator,index]
    pack.copies.refresh()
    assert_follows(pack, frozen=False)
    q.enable_adapters(False)  # type: ignore[operator]
    pack.copies.refresh()
    assert_follows(pack, frozen=False)
    v.enable_adapters(False)  # type: ignore[operator]
    pack.copies.refresh()
    assert not pack.forward(draw(3, K), False)[1].any()
    q.enable_adapters(True)  # type: ignore[operator]
    v.enable_adapters(True)  # type: ignore[operator]
    pack.copies.refresh()
    assert_follows(pack, frozen=False)
    assert places == [t.data_ptr() for f in pack.linear.folds() for t in (f.matrix, f.columns, f.factors)]
