"""All blocks arrive where they belong, scaled, and nothing beside them is touched."""

import pytest
import torch
from torch import Tensor, nn

from hdl.kernels.adapter_copies import CHUNK, AdapterCopies, Block

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


class Module(nn.Module):
    def __init__(self, scaling: float) -> None:
        super().__init__()
        self.scaling = {"default": scaling}
        self.disable_adapters = False


def blocks_of(matrix: Tensor, dtype: torch.dtype) -> list[Block]:
    sources = [nn.Parameter(torch.randn(s, device=DEVICE, dtype=dtype)) for s in ((3, 40), (50, 3), (130, 5))]
    targets = [matrix[:3, 8:48], matrix[3:53, :3], matrix[60:190, 3:8]]
    return [
        Block(source, target, Module(scaling), scaled)
        for source, target, scaling, scaled in zip(sources, targets, (9.0, 2.0, 0.5), (False, True, True))
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_block_and_nothing_else(dtype: torch.dtype) -> None:
    matrix = torch.full((200, 48), float("nan"), device=DEVICE, dtype=dtype)
    blocks = blocks_of(matrix, dtype)
    copies = AdapterCopies(blocks)
    copies.refresh()
    for block, factor in zip(blocks, (1.0, 2.0, 0.5)):
        assert torch.equal(block.target, (block.source.float() * factor).to(dtype))
    assert int(matrix.isnan().sum()) == matrix.numel() - sum(b.target.numel() for b in blocks)


def test_follows_values_places_and_switches() -> None:
    matrix = torch.zeros(200, 48, device=DEVICE)
    blocks = blocks_of(matrix, torch.float32)
    copies = AdapterCopies(blocks)
    copies.refresh()
    with torch.no_grad():
        blocks[0].source.mul_(3)  # where it was
    blocks[1].source.data = torch.randn_like(blocks[1].source)  # somewhere else
    blocks[2].module.disable_adapters = True
    copies.refresh()
    assert torch.equal(blocks[0].target, blocks[0].source)
    assert torch.equal(blocks[1].target, blocks[1].source * 2)
    assert not blocks[2].target.any()


def test_blocks_larger_than_a_program() -> None:
    matrix = torch.zeros(3, CHUNK, device=DEVICE)
    block = Block(nn.Parameter(torch.randn(2, CHUNK - 1, device=DEVICE)), matrix[1:, 1:], Module(1.0), False)
    AdapterCopies([block]).refresh()
    assert torch.equal(block.target, block.source)


def test_sources_of_different_dtypes() -> None:
    matrix = torch.zeros(200, 48, device=DEVICE)
    blocks = blocks_of(matrix, torch.float32)
    blocks[1].source.data = blocks[1].source.data.to(torch.bfloat16)
    AdapterCopies(blocks).refresh()
    assert torch.equal(blocks[1].target, blocks[1].source.float() * 2)
