"""Settled blocks are those that a bf16 checkpoint of them keeps bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qatlora.grid import Q4Blocks, decode, encode_reference, recover, search_steps, settle
from qatlora.grid.format import latents, nearest_levels, pack


def kinds_of_blocks() -> dict[str, Q4Blocks]:
    """Blocks as training deploys them: searched steps, llama.cpp's rule, any step at all."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(64, 2048, generator=generator) * 0.03
    weight[3, 64:96] = 0
    weight[4, :31], weight[5] = 0, weight[5].sign() * 0.01
    steps = search_steps(weight)
    moved = (steps.float() * (1 + 0.1 * torch.randn(steps.shape, generator=generator))).half()
    return {
        "searched": Q4Blocks(steps, nearest_levels(latents(weight, steps))),
        "moved": Q4Blocks(moved, nearest_levels(latents(weight, steps))),
        "reference": encode_reference(weight),
        "even levels": Q4Blocks(steps, nearest_levels(latents(weight, steps)) // 2 * 2),
    }


@pytest.mark.parametrize("kind", ["searched", "moved", "reference", "even levels"])
def test_settling_keeps_the_bf16_values_and_is_found_again_bit_for_bit(kind: str) -> None:
    blocks = kinds_of_blocks()[kind]
    settled = settle(blocks)
    stored = decode(settled, torch.bfloat16)
    assert torch.equal(stored, decode(blocks, torch.bfloat16))
    again = recover(stored)
    assert again.on_grid.all()
    assert torch.equal(pack(again.blocks), pack(settled))


@settings(max_examples=200, deadline=None)
@given(
    st.floats(-60000, 60000, width=16),
    st.lists(st.integers(-8, 7), min_size=32, max_size=32),
)
def test_any_block_settles_to_its_own_bf16_values(step: float, levels: list[int]) -> None:
    blocks = Q4Blocks(
        torch.tensor([[step]], dtype=torch.float16), torch.tensor([levels], dtype=torch.int8)
    )
    settled = settle(blocks)
    assert torch.equal(decode(settled, torch.bfloat16), decode(blocks, torch.bfloat16))
    assert torch.equal(pack(settle(settled)), pack(settled))
