"""All blocks arrive where they belong, scaled, and nothing beside them is touched."""

from typing import cast

import pytest
import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from hdl.kernels.adapter_copies import CHUNK, AdapterCopies
from hdl.kernels.folded import Fold
from hdl.kernels.linears import Block, Lora, PackedLinear
from tests.kernels.helpers import DEVICE, DTYPES

# rows, columns, and where in the matrix; 8 columns from 16 are aligned, the others are not.
PLACES = [((3, 40), 0, 8), ((50, 3), 3, 0), ((130, 5), 60, 3), ((20, 8), 60, 16), ((30, 8), 90, 16)]
FACTORS = (1.0, 2.0, 0.5, 1.0, 3.0)

pytestmark = pytest.mark.usefixtures("path")


class Module(nn.Module):
    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = {"default": scaling}
        self.active_adapters = ["default"]
        self.disable_adapters = False


def lora_of(scaling: float) -> Lora:
    return Lora(cast(LoraLinear, Module(scaling)), "default", slice(0))


class Linear:
    """Of a PackedLinear, what its copies are asked for."""

    def __init__(self, blocks: list[Block]) -> None:
        self.blocks = blocks

    def copies(self) -> list[Block]:
        return self.blocks

    def folds(self) -> list[Fold]:
        return []


def copies_of(blocks: list[Block]) -> AdapterCopies:
    return AdapterCopies([cast(PackedLinear, Linear([block])) for block in blocks])


def blocks_of(matrix: Tensor, dtype: torch.dtype) -> list[Block]:
    """The sources are views of one flat tensor, each beginning at 16 bytes or not as it comes."""
    flat = torch.randn(sum(rows * columns for (rows, columns), _, _ in PLACES), device=DEVICE, dtype=dtype)
    blocks, start = [], 0
    for ((rows, columns), row, column), factor in zip(PLACES, FACTORS):
        source = nn.Parameter(flat[start : start + rows * columns].view(rows, columns))
        start += rows * columns
        target = matrix[row : row + rows, column : column + columns]
        scaled = factor != 1.0
        blocks.append(Block(source, target, lora_of(factor if scaled else 9.0), scaled))
    return blocks


@pytest.mark.parametrize("source", DTYPES)
@pytest.mark.parametrize("target", DTYPES)
def test_every_block_and_nothing_else(source: torch.dtype, target: torch.dtype) -> None:
    matrix = torch.full((200, 48), float("nan"), device=DEVICE, dtype=target)
    blocks = blocks_of(matrix, source)
    copies_of(blocks).refresh()
    for block, factor in zip(blocks, FACTORS):
        assert torch.equal(block.target, (block.source.float() * factor).to(target))
    assert int(matrix.isnan().sum()) == matrix.numel() - sum(b.target.numel() for b in blocks)


def test_follows_values_places_and_switches() -> None:
    matrix = torch.zeros(200, 48, device=DEVICE)
    blocks = blocks_of(matrix, torch.float32)
    copies = copies_of(blocks)

    def assert_follows(*factors: float) -> None:
        copies.refresh()
        for block, factor in zip(blocks, factors):
            assert torch.equal(block.target, block.source * factor)

    assert_follows(*FACTORS)
    with torch.no_grad():
        blocks[0].source.mul_(3)  # where it was
    assert_follows(*FACTORS)
    for block, moved in zip(blocks, blocks_of(matrix, torch.float32)):
        block.source.data = moved.source.data * 2  # as a whole, somewhere else
    assert_follows(*FACTORS)
    module = cast(Module, blocks[2].lora.module)
    module.disable_adapters = True
    assert_follows(1.0, 2.0, 0.0, 1.0, 3.0)
    module.disable_adapters, module.active_adapters = False, ["another"]
    assert_follows(1.0, 2.0, 0.0, 1.0, 3.0)
    module.active_adapters = ["another", "default"]
    blocks[4].lora.module.scaling["default"] = 0.25
    assert_follows(1.0, 2.0, 0.5, 1.0, 0.25)


def test_makes_its_table_once(monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.zeros(200, 48, device=DEVICE)
    copies = copies_of(blocks_of(matrix, torch.float32))
    copies.refresh()
    monkeypatch.setattr("hdl.kernels.adapter_copies._grouped", None)
    copies.refresh()


def test_blocks_larger_than_a_program() -> None:
    matrix = torch.zeros(3, CHUNK, device=DEVICE)
    block = Block(nn.Parameter(torch.randn(2, CHUNK - 1, device=DEVICE)), matrix[1:, 1:], lora_of(1.0), False)
    copies_of([block]).refresh()
    assert torch.equal(block.target, block.source)


def test_sources_of_different_dtypes() -> None:
    matrix = torch.zeros(200, 48, device=DEVICE)
    blocks = blocks_of(matrix, torch.float32)
    blocks[1].source.data = blocks[1].source.data.to(torch.bfloat16)
    copies_of(blocks).refresh()
    assert torch.equal(blocks[1].target, blocks[1].source.float() * 2)


def test_nothing_to_copy() -> None:
    copies_of([]).refresh()
