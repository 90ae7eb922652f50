"""Small layers with random parameters, shared by the tests of this folder."""

import dataclasses

import torch
from peft import LoraConfig
from torch import Tensor

from qatlora.adapters.deployed import AdapterRule, deployed_weight
from qatlora.adapters.expert_layer import ExpertAdapter
from qatlora.adapters.layer import AdapterLayer, GridAdapter
from qatlora.base.linear import GridLinear
from qatlora.base.stores import Bf16Store, Q4Store, Store, reciprocal
from qatlora.grid import Q4Blocks, decode

OUT, IN = 6, 96
RULE = AdapterRule(
    kind="lora", rank=4, alpha=12.0, steps_rank=3, rounding="frozen", dither="auto", seed=7
)
RULES = [
    RULE,
    dataclasses.replace(RULE, rounding="reference", dither="never"),
    dataclasses.replace(RULE, kind="steps"),
    dataclasses.replace(RULE, kind="both"),
]
NAMES = ("lora_A", "lora_B", "lora_steps_A", "lora_steps_B")


def random_blocks(seed: int = 0, shape: tuple[int, int] = (OUT, IN)) -> Q4Blocks:
    """Blocks on a grid, one of them all zero."""
    out, width = shape
    generator = torch.Generator().manual_seed(seed)
    steps = torch.rand(out, width // 32, generator=generator).mul(0.02).add(0.001).half()
    levels = torch.randint(-8, 8, (out, width), generator=generator).to(torch.int8)
    steps[2, 1] = 0
    levels[2, 32:64] = 0
    return Q4Blocks(steps, levels)


def adapter(rule: AdapterRule, *, filled: bool = True, on_grid: bool = True) -> GridAdapter:
    """A layer with random parameters over an on-grid or a latent base."""
    store = store_of(random_blocks(), on_grid=on_grid)
    torch.manual_seed(1)
    layer = GridAdapter(GridLinear("model.x", store), "default", LoraConfig(), rule=rule)
    if filled:
        fill(layer)
    return layer


def store_of(blocks: Q4Blocks, *, on_grid: bool) -> Store:
    """The blocks themselves, or weights beside the levels that they are the nearest of."""
    if on_grid:
        return Q4Store(blocks)
    weight = decode(blocks) + 0.3 * blocks.steps.float().repeat_interleave(32, 1)
    return Bf16Store(weight.bfloat16(), blocks.steps, on_grid=False)


def fill(layer: AdapterLayer) -> None:
    """Random parameters where a new adapter has zeros."""
    for name in ("lora_B", "lora_steps_B"):
        parameters = layer.parameters_of(name)
        if parameters is not None:
            torch.nn.init.normal_(parameters, std=0.05 if name == "lora_B" else 0.2)


def factor_gradients(layer: GridAdapter | ExpertAdapter, g: Tensor) -> dict[str, Tensor]:
    """Gradients of the factors from the dense g = dL/dW, float64 [out, in], by the formulas."""
    blocks, grads = deployed_weight(layer), {}
    base_steps = layer.get_base_layer().store.steps
    alive = (base_steps != 0).repeat_interleave(32, dim=1).double()
    ratio = (blocks.steps.double() * reciprocal(base_steps).double()).repeat_interleave(32, dim=1)
    if not layer.rule.moves_steps:
        ratio = torch.ones_like(ratio)
    if layer.rule.rounding == "reference":
        alive = torch.ones_like(alive)
    if layer.rule.moves_levels:
        down, up = (layer.parameters_of(name).detach().double() for name in NAMES[:2])
        delta_grad = g * alive * ratio * layer.rule.scale
        grads["lora_A"], grads["lora_B"] = up.T @ delta_grad, delta_grad @ down.T
    if layer.rule.moves_steps:
        down, up = (layer.parameters_of(name).detach().double() for name in NAMES[2:])
        per_block = (g * blocks.levels.double()).unflatten(1, (-1, 32)).sum(-1)
        factor_grad = per_block * base_steps.double()
        grads["lora_steps_A"], grads["lora_steps_B"] = up.T @ factor_grad, factor_grad @ down.T
    return grads
