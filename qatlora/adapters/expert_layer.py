"""The adapter of a stack of experts: a layer of its own for each expert that is routed to."""

from torch import Tensor

from qatlora.adapters.layer import AdapterLayer, deployed_product
from qatlora.base.experts import ExpertStack, Stacked
from qatlora.base.linear import GridLinear


class StackAdapter(AdapterLayer[ExpertStack], Stacked):
    """Factors of all experts, as PEFT's `target_parameters` has them for a fused parameter.

    docs/decisions/0013-experts-are-a-stack-of-linears.md compares the two layouts.
    """

    def linears(self) -> list["ExpertAdapter"]:
        """The experts in order, each with its own factors.

        All factors are taken apart at once: the gradients of all experts then come together in one
        tensor, where slices would each fill one of the size of the stack.
        """
        base = self.get_base_layer()
        split = [self._split(name, base.num_matrices) for name in self.adapter_layer_names]
        return [
            ExpertAdapter(self, linear, number, parameters)
            for number, (linear, *parameters) in enumerate(zip(base.linears(), *split, strict=True))
        ]

    def _split(self, name: str, num: int) -> list[Tensor | None]:
        factors = self.parameters_of(name)
        return [None] * num if factors is None else list(factors.chunk(num))


class ExpertAdapter:
    """One expert's share of a `StackAdapter`, which `deployed_weight` asks as it asks a layer."""

    def __init__(
        self, stack: StackAdapter, base: GridLinear, number: int, parameters: list[Tensor | None]
    ) -> None:
        self.rule = stack.rule
        self.keeps_blocks = stack.keeps_blocks
        self._base = base
        self._parameters = dict(zip(stack.adapter_layer_names, parameters, strict=True))
        held = stack.held_weight
        self._held_weight = None if held is None else held[number]

    def get_base_layer(self) -> GridLinear:
        """The matrix below."""
        return self._base

    def parameters_of(self, name: str) -> Tensor | None:
        """Rows of `lora_A`, `lora_B`, `lora_steps_A` or `lora_steps_B`; None if absent or off."""
        return self._parameters[name]

    def __call__(self, x: Tensor) -> Tensor:
        """[tokens, in] -> [tokens, out]."""
        return deployed_product(x, self, self._held_weight, list(self._parameters.values()))
