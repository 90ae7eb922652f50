"""Blocks put into a model: which module they become, and what stays."""

import torch
from torch import nn

from qatlora.base.plain import put_blocks
from qatlora.grid import decode, encode_reference


def test_blocks_become_a_new_frozen_linear_with_the_bias_of_the_old_one():
    model = nn.ModuleDict({"layer": nn.Linear(64, 32), "other": nn.Linear(64, 32)})
    old, other = model["layer"], model["other"]
    blocks = encode_reference(torch.randn(32, 64, generator=torch.Generator().manual_seed(1)))
    put_blocks(model, [("layer", blocks)], torch.bfloat16)
    new = model["layer"]
    assert new is not old
    assert torch.equal(new.weight, decode(blocks, torch.bfloat16))
    assert not new.weight.requires_grad
    assert new.bias is old.bias
    assert model["other"] is other
