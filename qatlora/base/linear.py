"""`GridLinear`: the linear layer of a loaded base, whose weight is what its Q4_0 blocks say."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from qatlora.base.stores import Bf16Store, Store
from qatlora.grid import Q4Blocks, decode, eager_in_user_graphs


class GridLinear(nn.Module):
    """Replaces a trained `nn.Linear` (or `Linear4bit`): y = x W^T + bias, W on the Q4_0 grid.

    Attributes:
        tensor_name: the weight's name in the checkpoint; it keys the dither and the digests.
        store: steps and latent levels of the base weight, [out_features, in_features].
        first_row: where its rows begin in that tensor, which may be a stack of matrices.
        held_weight: the decoded weight while somebody holds it for many forwards, else None.
    """

    num_matrices = 1

    def __init__(
        self, tensor_name: str, store: Store, bias: Tensor | None = None, first_row: int = 0
    ) -> None:
        super().__init__()
        self.tensor_name = tensor_name
        self.store = store
        self.first_row = first_row
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features = store.steps.shape[0]
        self.in_features = store.in_features
        self.held_weight: Tensor | None = None

    @property
    def qweight(self) -> Tensor:
        """Where PEFT looks for the device of a quantized layer, which new adapters then go to."""
        return self.store.steps

    def checkpoint_weight(self) -> Tensor | None:
        """The checkpoint's weight, where it is stored as it is."""
        return self.store.weight if isinstance(self.store, Bf16Store) else None

    def base_blocks(self) -> Q4Blocks:
        """The base's own blocks: its steps, and each latent rounded to the nearest level."""
        return Q4Blocks(self.store.steps, self.store.levels())

    @eager_in_user_graphs
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] through the base's blocks, in autocast's dtype."""
        dtype = compute_dtype(x)
        if self.held_weight is not None:
            return functional.linear(x.to(dtype), self.held_weight.to(dtype), self.bias)
        y: Tensor = _FrozenProduct.apply(x.to(dtype), self)
        return y if self.bias is None else y + self.bias

    def extra_repr(self) -> str:
        """Shape, storage and whether the base lies on a grid."""
        return (
            f"{self.tensor_name}, in={self.in_features}, out={self.out_features}, "
            f"on_grid={self.store.on_grid}"
        )


class _FrozenProduct(torch.autograd.Function):
    """y = x W^T that keeps neither x nor W: W is decoded again for the gradient of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: GridLinear) -> Tensor:
        ctx.layer = layer
        return x @ decode(layer.base_blocks(), x.dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor, None]:
        return grad_y @ decode(ctx.layer.base_blocks(), grad_y.dtype), None


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies `x`: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
