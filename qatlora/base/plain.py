"""Blocks as the weights of a plain transformers model, to measure what a grid does to them."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from qatlora.base.names import is_stack
from qatlora.grid import Q4Blocks, decode


def put_blocks(
    model: nn.Module, blocks: Iterable[tuple[str, Q4Blocks]], dtype: torch.dtype
) -> None:
    """Let the named weights be these blocks, decoded to `dtype`; float32 holds them exactly."""
    for name, value in blocks:
        put_weight(model, name, decode(value, dtype))


def put_weight(model: nn.Module, name: str, weight: Tensor) -> None:
    """Put a frozen weight in its place: of a stack [E, out, in], of a linear [out, in].

    A linear keeps its bias. Its module is always a new one: that of an NF4 build is no `nn.Linear`,
    that of a packed build has no weight yet.
    """
    if is_stack(name):
        experts, _, projection = name.rpartition(".")
        setattr(model.get_submodule(experts), projection, nn.Parameter(weight, requires_grad=False))
        return
    bias = model.get_submodule(name).bias
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    linear.register_parameter("bias", bias)  # type: ignore[arg-type]
    model.set_submodule(name, linear)
