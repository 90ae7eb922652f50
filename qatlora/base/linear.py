"""`GridLinear`: the linear layer of a loaded base, whose weight is what its Q4_0 blocks say."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from qatlora.base.stores import Store
from qatlora.grid import Q4Blocks, decode, eager_in_user_graphs


class GridLinear(nn.Module):
    """Replaces a trained `nn.Linear` (or `Linear4bit`): y = x W^T + bias, W on the Q4_0 grid.

    Attributes:
        tensor_name: the module's name in the checkpoint; it keys the dither and the digests.
        store: steps and latent levels of the base weight, [out_features, in_features].
        held_weight: the decoded weight while somebody holds it for many forwards, else None.
    """

    def __init__(self, tensor_name: str, store: Store, bias: Tensor | None = None) -> None:
        super().__init__()
        self.tensor_name = tensor_name
        self.store = store
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        self.out_features = store.steps.shape[0]
        self.in_features = store.in_features
        self.held_weight: Tensor | None = None

    @property
    def qweight(self) -> Tensor:
        """Where PEFT looks for the device of a quantized layer, which new adapters then go to."""
        return self.store.steps

    def base_blocks(self) -> Q4Blocks:
        """The base's own blocks: its steps, and each latent rounded to the nearest level."""
        return Q4Blocks(self.store.steps, self.store.levels())

    @eager_in_user_graphs
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] through the base's blocks, in the dtype of `x`."""
        weight = self.held_weight
        if weight is None:
            with torch.no_grad():
                weight = decode(self.base_blocks(), x.dtype)
        return functional.linear(x, weight.to(x.dtype), self.bias)

    def extra_repr(self) -> str:
        """Shape, storage and whether the base lies on a grid."""
        return (
            f"{self.tensor_name}, in={self.in_features}, out={self.out_features}, "
            f"on_grid={self.store.on_grid}"
        )
