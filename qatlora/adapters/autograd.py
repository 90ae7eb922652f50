"""The linear map y = x W^T with W = deployed weight, and its straight-through gradient.

Only x and the adapter's parameters are kept for the backward pass: W is computed again there,
because keeping it for every layer costs as much as the bf16 model (58 GB for 31B). Where memory is
no concern a layer `keeps_blocks`: 8.5 bits per weight instead of computing them a second time.

With g = dL/dW = dY^T X [out, in] the straight-through gradients are

    lora      d(B A)  = scale * g                    (rounding and clamp count as the identity)
    steps     d(step') = sum over the block of g * level; d(B_s A_s) = d(step') * step
    both      d(B A)  = scale * g * step' / step

For `lora` alone g is never formed: dB = scale * dY^T (X A^T) and dA = scale * (dY B)^T X cost what
LoRA costs. For the others g is formed in tiles of rows and reduced at once.
In an all-zero block (step 0) nothing moves the weight, so its share of the gradient is taken out.

`LatentProduct` is the same for a layer whose weight w itself is trained, with c the change of the
steps where they are learned:

    latents   dw = g * step' / step       (step' = step where the steps do not move)
    steps     dc = sum over the block of g * level * step

The whole of g is then the result; its products run in x's dtype, and it is widened once.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from qatlora.adapters.deployed import deployed_weight, moved_steps
from qatlora.base.stores import reciprocal
from qatlora.grid import BLOCK_SIZE, decode

if TYPE_CHECKING:
    from qatlora.adapters.deployed import MatrixAdapter
    from qatlora.adapters.latent_layer import LatentLinear

_TILE_WEIGHTS = 1 << 22


class DeployedLinear(torch.autograd.Function):
    """y = x W^T; x [..., in] in the compute dtype, parameters float32 or None."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        layer: "MatrixAdapter",
        down: Tensor | None,
        up: Tensor | None,
        steps_down: Tensor | None,
        steps_up: Tensor | None,
    ) -> Tensor:
        """Multiply by the deployed weight; keep x and the parameters."""
        ctx.layer = layer
        ctx.save_for_backward(x, down, up, steps_down, steps_up)
        blocks = deployed_weight(layer)
        ctx.blocks = blocks if layer.keeps_blocks else None
        return x @ decode(blocks, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, A, B, A_s, B_s."""
        x, *parameters = ctx.saved_tensors
        down, up, steps_down, _ = parameters
        layer: MatrixAdapter = ctx.layer
        blocks = deployed_weight(layer) if ctx.blocks is None else ctx.blocks
        grad_y = grad_y.to(x.dtype)
        grad_x = grad_y @ decode(blocks, x.dtype) if ctx.needs_input_grad[0] else None
        x_flat, y_flat = x.flatten(0, -2), grad_y.flatten(0, -2)
        if steps_down is not None:
            grads = _dense_gradients(layer, blocks.levels, x_flat, y_flat, parameters)
        elif down is not None:
            grads = (*_lora_gradients(layer, x_flat, y_flat, down, up), None, None)
        else:
            grads = (None,) * 4
        return (grad_x, None, *grads)


def _lora_gradients(
    layer: "MatrixAdapter", x: Tensor, grad_y: Tensor, down: Tensor, up: Tensor
) -> tuple[Tensor, Tensor]:
    """dA, dB in float32 at LoRA's cost; x [tokens, in], grad_y [tokens, out]."""
    scale = layer.rule.scale
    projected = x @ down.to(x.dtype).T
    pulled = grad_y @ up.to(x.dtype)
    grad_up = (grad_y.T @ projected).float().mul_(scale)
    grad_down = (pulled.T @ x).float().mul_(scale)
    zero_blocks = layer.get_base_layer().store.zero_blocks
    if len(zero_blocks) and layer.rule.rounding == "frozen":
        _remove_zero_blocks(zero_blocks, x, grad_y, (down, up), (grad_down, grad_up), scale)
    return grad_down, grad_up


def _remove_zero_blocks(
    zero_blocks: Tensor,
    x: Tensor,
    grad_y: Tensor,
    parameters: tuple[Tensor, Tensor],
    grads: tuple[Tensor, Tensor],
    scale: float,
) -> None:
    """Subtract what the zero blocks [n, (row, column)] of g contributed to dA and dB, in place."""
    rows, columns = zero_blocks.unbind(-1)
    down, up = parameters
    grad_down, grad_up = grads
    x_blocks = x.unflatten(-1, (-1, BLOCK_SIZE)).float()
    down_blocks = down.unflatten(-1, (-1, BLOCK_SIZE))
    grad_down_blocks = grad_down.unflatten(-1, (-1, BLOCK_SIZE))
    for column in columns.unique():
        chosen = rows[columns == column]
        g = scale * grad_y[:, chosen].float().T @ x_blocks[:, column]
        grad_up.index_add_(0, chosen, -(g @ down_blocks[:, column].T))
        grad_down_blocks[:, column] -= up[chosen].T @ g


def _dense_gradients(
    layer: "MatrixAdapter",
    levels: Tensor,
    x: Tensor,
    grad_y: Tensor,
    parameters: list[Tensor | None],
) -> tuple[Tensor | None, ...]:
    """dA, dB, dA_s, dB_s in float32, from g in tiles of rows."""
    down, up, steps_down, steps_up = parameters
    assert steps_down is not None
    assert steps_up is not None
    steps = layer.get_base_layer().store.steps
    moving = None if down is None or up is None else _LevelGradients(layer, steps, down, up)
    grad_factor = torch.empty(steps.shape, dtype=torch.float32, device=steps.device)
    tile_rows = max(1, _TILE_WEIGHTS // x.shape[-1])
    for first in range(0, len(steps), tile_rows):
        rows = slice(first, first + tile_rows)
        g = (grad_y[:, rows].T @ x).float().unflatten(-1, (-1, BLOCK_SIZE))
        weighted = levels[rows].float().unflatten(-1, (-1, BLOCK_SIZE)).mul_(g)
        grad_factor[rows] = weighted.sum(-1) * steps[rows].float()
        del weighted  # before the next tile-sized temporary
        if moving is not None:
            moving.add(rows, g)
    level_grads = (None, None) if moving is None else (moving.grad_down, moving.grad_up)
    return (*level_grads, steps_up.T @ grad_factor, grad_factor @ steps_down.T)


class _LevelGradients:
    """dA and dB in float32 where the steps move too, filled from tiles of rows of g."""

    def __init__(self, layer: "MatrixAdapter", steps: Tensor, down: Tensor, up: Tensor) -> None:
        self.down, self.up = down, up
        self.grad_down, self.grad_up = torch.zeros_like(down), torch.empty_like(up)
        ratio = moved_steps(layer, steps).float() * reciprocal(steps)
        self.factor = ratio.mul_(layer.rule.scale)

    def add(self, rows: slice, g: Tensor) -> None:
        """Take in g of these rows, [rows, in / 32, 32]; it is overwritten."""
        moved = g.mul_(self.factor[rows].unsqueeze(-1)).flatten(-2)
        self.grad_up[rows] = moved @ self.down.T
        self.grad_down += self.up[rows].T @ moved


class LatentProduct(torch.autograd.Function):
    """y = x W^T of a `LatentLinear`; x [..., in] in the compute dtype."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, layer: "LatentLinear", latent: Tensor, step_change: Tensor | None
    ) -> Tensor:
        """Multiply by the deployed weight; keep x, and the blocks where the layer keeps them."""
        ctx.layer = layer
        ctx.save_for_backward(x)
        blocks = deployed_weight(layer)
        ctx.blocks = blocks if layer.keeps_blocks else None
        return x @ decode(blocks, x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of x, the latents and the change of the steps."""
        (x,) = ctx.saved_tensors
        layer: LatentLinear = ctx.layer
        blocks = deployed_weight(layer) if ctx.blocks is None else ctx.blocks
        grad_y = grad_y.to(x.dtype)
        grad_x = grad_y @ decode(blocks, x.dtype) if ctx.needs_input_grad[0] else None
        # Of a transposed left factor a CPU makes the product at half the speed of one in order.
        g = (grad_y.flatten(0, -2).T.contiguous() @ x.flatten(0, -2)).float()
        g_blocks = g.unflatten(-1, (-1, BLOCK_SIZE))
        g_blocks[layer.zero_blocks.unbind(-1)] = 0.0
        grad_change = None
        if layer.step_change is not None:
            levels = blocks.levels.unflatten(-1, (-1, BLOCK_SIZE))
            grad_change = (g_blocks * levels).sum(-1).mul_(layer.steps)
            ratio = blocks.steps.float() * reciprocal(layer.steps)
            g_blocks.mul_(ratio.unsqueeze(-1))
        return grad_x, None, g.to(layer.latent.dtype), grad_change
