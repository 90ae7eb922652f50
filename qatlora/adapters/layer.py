"""The PEFT layers of an adapter inside the grid: they multiply by the deployed weight."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from qatlora.adapters.autograd import DeployedLinear
from qatlora.adapters.deployed import AdapterRule
from qatlora.base.experts import ExpertStack
from qatlora.base.linear import GridLinear, compute_dtype
from qatlora.grid import BLOCK_SIZE, eager_in_user_graphs

if TYPE_CHECKING:
    from qatlora.adapters.expert_layer import ExpertAdapter


BaseT = TypeVar("BaseT", bound=GridLinear | ExpertStack)


class AdapterLayer(nn.Module, LoraLayer, Generic[BaseT]):
    """A LoRA layer over one or more matrices on the grid: its parameters.

    Those of several matrices lie one below the other, A [E * r, in] and B [E * out, r], so that the
    factors of one matrix are whole rows.
    """

    adapter_layer_names = ("lora_A", "lora_B", "lora_steps_A", "lora_steps_B")

    def __init__(
        self,
        base_layer: BaseT,
        adapter_name: str,
        config: LoraConfig,
        *,
        rule: AdapterRule,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.rule = rule
        self.lora_steps_A = nn.ModuleDict()
        self.lora_steps_B = nn.ModuleDict()
        self.held_weight: Tensor | None = None
        self.keeps_blocks = False
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, rule.rank, int(rule.alpha), config)

    def update_layer(
        self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **_: Any
    ) -> None:
        """Create the parameters of one adapter in float32; B starts at zero."""
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = self.rule.scale
        base = self.get_base_layer()
        device, num = base.qweight.device, base.num_matrices
        pairs: list[tuple[nn.ModuleDict, nn.ModuleDict, int, int]] = []
        if self.rule.moves_levels:
            pairs.append((self.lora_A, self.lora_B, base.in_features, r))
        if self.rule.moves_steps:
            width = base.in_features // BLOCK_SIZE
            pairs.append((self.lora_steps_A, self.lora_steps_B, width, self.rule.steps_rank))
        for down, up, width, rank in pairs:
            down[adapter_name] = nn.Linear(width, num * rank, bias=False, device=device).float()
            still = nn.Linear(rank, num * base.out_features, bias=False, device=device).float()
            nn.init.zeros_(still.weight)
            up[adapter_name] = still
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_base_layer(self) -> BaseT:
        """The layer below the adapter."""
        base: BaseT = super().get_base_layer()  # type: ignore[assignment]  # PEFT: any module
        return base

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, GridLinear | ExpertStack)
        return module.in_features, module.out_features

    def parameters_of(self, name: str) -> Tensor | None:
        """Weight of `lora_A`, `lora_B`, `lora_steps_A` or `lora_steps_B`; None if absent or off."""
        if self.disable_adapters:
            return None
        modules = getattr(self, name)
        active = self.active_adapters[0]
        return modules[active].weight if active in modules else None


class GridAdapter(AdapterLayer[GridLinear]):
    """The adapter of a linear."""

    @eager_in_user_graphs
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] through the deployed weight, in autocast's dtype."""
        parameters = [self.parameters_of(name) for name in self.adapter_layer_names]
        return deployed_product(x, self, self.held_weight, parameters)


def deployed_product(
    x: Tensor,
    layer: "GridAdapter | ExpertAdapter",
    held_weight: Tensor | None,
    parameters: Sequence[Tensor | None],
) -> Tensor:
    """[..., in] -> [..., out] through the deployed weight of one matrix, in autocast's dtype.

    Args:
        x: the input.
        layer: whose weight it is.
        held_weight: that weight, decoded, where somebody holds it; never used in training.
        parameters: A, B, A_s and B_s.
    """
    dtype = compute_dtype(x)
    bias = layer.get_base_layer().bias
    if held_weight is not None and not torch.is_grad_enabled():
        return functional.linear(x.to(dtype), held_weight.to(dtype), bias)
    y: Tensor = DeployedLinear.apply(x.to(dtype), layer, *parameters)
    return y if bias is None else y + bias
