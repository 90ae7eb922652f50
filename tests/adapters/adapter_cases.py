"""Small layers with random parameters, shared by the tests of this folder."""

import torch
from peft import LoraConfig

from qatlora.adapters.deployed import AdapterRule
from qatlora.adapters.layer import GridAdapter
from qatlora.base.linear import GridLinear
from qatlora.base.stores import Bf16Store, Q4Store
from qatlora.grid import Q4Blocks, decode

OUT, IN = 6, 96
RULE = AdapterRule(
    kind="lora", rank=4, alpha=12.0, steps_rank=3, rounding="frozen", dither="auto", seed=7
)


def random_blocks(seed: int = 0) -> Q4Blocks:
    """Blocks on a grid, one of them all zero."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(OUT, IN // 32, generator=generator).mul(0.02).add(0.001).half()
    levels = torch.randint(-8, 8, (OUT, IN), generator=generator).to(torch.int8)
    steps[2, 1] = 0
    levels[2, 32:64] = 0
    return Q4Blocks(steps, levels)


def adapter(rule: AdapterRule, *, filled: bool = True, on_grid: bool = True) -> GridAdapter:
    """A layer with random parameters over an on-grid or a latent base."""
    blocks = random_blocks()
    if on_grid:
        store = Q4Store(blocks)
    else:
        weight = decode(blocks) + 0.3 * blocks.steps.float().repeat_interleave(32, 1)
        store = Bf16Store(weight.bfloat16(), blocks.steps, on_grid=False)
    torch.manual_seed(1)
    layer = GridAdapter(GridLinear("model.x", store), "default", LoraConfig(), rule=rule)
    if filled:
        for name in ("lora_B", "lora_steps_B"):
            parameters = layer.parameters_of(name)
            if parameters is not None:
                torch.nn.init.normal_(parameters, std=0.05 if name == "lora_B" else 0.2)
    return layer
