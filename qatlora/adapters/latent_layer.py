"""`LatentLinear`: a layer whose weight itself is trained, seen only through the Q4_0 grid."""

import torch
from torch import Tensor, nn
from torch.nn import functional

from qatlora.adapters.autograd import LatentProduct
from qatlora.adapters.deployed import LatentRule
from qatlora.base.linear import GridLinear, compute_dtype
from qatlora.base.stores import Q4Store
from qatlora.grid import Q4Blocks, eager_in_user_graphs, encode_reference, settle


class LatentLinear(nn.Module):
    """y = x W^T + bias with W the deployed weight of a trained latent [out, in].

    Attributes:
        rule: how the latent becomes blocks.
        latent: the checkpoint's weight in float32 or bf16; the parameter.
        step_change: float32 [out, in / 32], 0 at the start, where the steps are learned; else None.
        steps: float16 [out, in / 32], the frozen steps of the checkpoint's weight.
        zero_blocks: int64 [n, 2], row and column of the blocks that nothing can move.
        settled: the blocks for good, once training is over.
        is_off: while True the layer is what it was before training.
        held_weight: the decoded weight while somebody holds it for many forwards, else None.
        keeps_blocks: keep the blocks from the forward to the backward pass.
    """

    steps: Tensor
    zero_blocks: Tensor

    def __init__(
        self,
        base: GridLinear,
        weight: Tensor,
        rule: LatentRule,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        """Take over name, steps and bias of a loaded layer, and start from the weight given.

        Args:
            base: a layer of the loaded base; it is not kept.
            weight: the checkpoint's, floating point [out, in]; copied.
            rule: how the latent becomes blocks.
            dtype: of the latent.
        """
        super().__init__()
        self.rule = rule
        self.latent = nn.Parameter(weight.detach().to(dtype, copy=True))
        steps, zero_blocks = base.store.steps, base.store.zero_blocks
        if rule.steps == "recomputed":
            zero_blocks = zero_blocks[:0]
        self.register_buffer("steps", steps, persistent=False)
        self.register_buffer("zero_blocks", zero_blocks, persistent=False)
        change = torch.zeros_like(steps, dtype=torch.float32)
        self.step_change = nn.Parameter(change) if rule.steps == "learned" else None
        first = encode_reference(weight) if rule.steps == "recomputed" else base.base_blocks()
        self._start = GridLinear(base.tensor_name, Q4Store(settle(first)), base.bias)
        self.settled: Q4Blocks | None = None
        self.is_off = False
        self.held_weight: Tensor | None = None
        self.keeps_blocks = False

    def get_base_layer(self) -> GridLinear:
        """The layer before training; its blocks are settled as those after it will be."""
        return self._start

    @eager_in_user_graphs
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] through the deployed weight, in autocast's dtype."""
        dtype = compute_dtype(x)
        bias = self._start.bias
        if self.held_weight is not None and not torch.is_grad_enabled():
            return functional.linear(x.to(dtype), self.held_weight.to(dtype), bias)
        y = LatentProduct.apply(x.to(dtype), self, self.latent, self.step_change)
        return y if bias is None else y + bias

    def extra_repr(self) -> str:
        """Name, shape and rule."""
        out_features, in_features = self.latent.shape
        return (
            f"{self._start.tensor_name}, in={in_features}, out={out_features}, "
            f"steps={self.rule.steps}"
        )
