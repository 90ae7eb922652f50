"""The experts of a layer, whose two stacks of matrices lie on the Q4_0 grid.

    x -> gate_up_proj of the expert -> gelu(gate) * up -> down_proj of it -> times its router weight

transformers keeps a stack as one parameter [experts, out, in]; in the GGUF it is one tensor, too.
Here it is one `GridLinear` for each expert, so that whatever is done to a linear, is done to an
expert, and only those that a token was routed to are ever decoded, one at a time.

Shapes: E experts, T tokens, K experts per token.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from qatlora.base.linear import GridLinear
from qatlora.base.names import is_stack
from qatlora.base.stores import Store
from qatlora.grid import Q4Blocks, eager_in_user_graphs

PLAIN_IMPLEMENTATION = "eager"
"""transformers' loop over experts, for plain models: `RoutedExperts` repeats it operation by
operation, so that both give the same values; its grouped products sum in another order."""


class Stacked(ABC):
    """What has a matrix for each expert: a stack of the base, or an adapter over one."""

    @abstractmethod
    def linears(self) -> Sequence[Any]:
        """A layer for each expert, in order: called with rows [n, in], it gives [n, out]."""


class ExpertStack(nn.Module, Stacked):
    """One projection of all experts of a layer.

    Attributes:
        tensor_name: of the parameter in the checkpoint; it keys the dither and the digests.
        experts: a `GridLinear` [out, in] for each.
    """

    def __init__(self, tensor_name: str, stores: Sequence[Store]) -> None:
        super().__init__()
        self.tensor_name = tensor_name
        num_rows = stores[0].steps.shape[0]
        self.experts = nn.ModuleList(
            GridLinear(tensor_name, store, first_row=number * num_rows)
            for number, store in enumerate(stores)
        )
        self.in_features = stores[0].in_features
        self.out_features = num_rows

    @property
    def num_matrices(self) -> int:
        """E."""
        return len(self.experts)

    @property
    def qweight(self) -> Tensor:
        """Where PEFT looks for the device (see `GridLinear.qweight`)."""
        return self.linears()[0].qweight

    def linears(self) -> list[GridLinear]:
        """The matrices in order, each a layer of its own."""
        return list(self.experts)  # type: ignore[arg-type]  # a ModuleList does not say of what

    def checkpoint_weight(self) -> list[Tensor] | None:
        """The checkpoint's weights [out, in], where they are stored as they are."""
        weights = [linear.checkpoint_weight() for linear in self.linears()]
        return None if any(weight is None for weight in weights) else weights  # type: ignore[return-value]

    @property
    def held_weight(self) -> Sequence[Tensor] | None:
        """As `GridLinear.held_weight`, one for each expert."""
        held = [linear.held_weight for linear in self.linears()]
        return None if any(weight is None for weight in held) else held  # type: ignore[return-value]

    @held_weight.setter
    def held_weight(self, weights: Sequence[Tensor] | None) -> None:
        for number, linear in enumerate(self.linears()):
            linear.held_weight = None if weights is None else weights[number]

    def base_blocks(self) -> Q4Blocks:
        """Steps [E, out, in / 32] and levels [E, out, in] of the base."""
        return stacked(linear.base_blocks() for linear in self.linears())

    def extra_repr(self) -> str:
        """Shape."""
        return f"{self.tensor_name}, in={self.in_features}, out={self.out_features}"


def stacked(matrices: Iterator[Q4Blocks]) -> Q4Blocks:
    """The blocks of single experts as those of their stack."""
    steps, levels = zip(*matrices, strict=True)
    with torch.autocast(steps[0].device.type, enabled=False):  # which refuses fp16 on a CPU
        return Q4Blocks(torch.stack(steps), torch.stack(levels))


class RoutedExperts(nn.Module):
    """In the place of transformers' experts: sends each token through those it was routed to.

    Attributes:
        gate_up_proj: a stack [E, 2 * intermediate, hidden], or an adapter over one.
        down_proj: the same of [E, hidden, intermediate].
    """

    def __init__(self, replaced: nn.Module) -> None:
        """Take over activation and parameters; `put_layer` replaces these."""
        super().__init__()
        self.act_fn: Callable[[Tensor], Tensor] = replaced.act_fn
        for name, parameter in replaced.named_parameters(recurse=False):
            self.register_parameter(name, parameter)  # type: ignore[arg-type]

    @eager_in_user_graphs
    def forward(self, hidden: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[T, hidden] -> [T, hidden].

        Args:
            hidden: the tokens.
            top_k_index: [T, K], the experts of each.
            top_k_weights: [T, K], what their outputs are multiplied by.
        """
        gate_up, down = self.gate_up_proj.linears(), self.down_proj.linears()
        output, by_rank = torch.zeros_like(hidden), top_k_index.transpose(0, 1)
        for expert in top_k_index.unique().tolist():
            ranks, tokens = torch.where(by_rank == expert)
            gate, up = gate_up[expert](hidden[tokens]).chunk(2, dim=-1)
            share = down[expert](self.act_fn(gate) * up) * top_k_weights[tokens, ranks, None]
            output.index_add_(0, tokens, share.to(output.dtype))
        return output


def matrices(blocks: Q4Blocks) -> list[Q4Blocks]:
    """The blocks of the single experts of a stack; of a linear the blocks themselves."""
    return [blocks] if blocks.levels.ndim == 2 else list(map(Q4Blocks, *blocks))


def put_layer(model: nn.Module, name: str, stores: Sequence[Store]) -> None:
    """Put a layer on the grid in the place of the weight of that name.

    Args:
        model: a transformers model.
        name: a linear's, whose bias is kept, or a stack's.
        stores: of the linear, or of each expert.
    """
    if not is_stack(name):
        bias = model.get_submodule(name).bias
        model.set_submodule(name, GridLinear(name, stores[0], bias))
        return
    parent, _, projection = name.rpartition(".")
    if not isinstance(model.get_submodule(parent), RoutedExperts):
        model.set_submodule(parent, RoutedExperts(model.get_submodule(parent)))
    experts = model.get_submodule(parent)
    delattr(experts, projection)  # a parameter, which no module may overwrite
    experts.add_module(projection, ExpertStack(name, stores))
