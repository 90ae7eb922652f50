"""The PEFT layer of an adapter inside the grid: its forward multiplies by the deployed weight."""

from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional

from qatlora.adapters.autograd import DeployedLinear
from qatlora.adapters.deployed import AdapterRule
from qatlora.base.linear import GridLinear
from qatlora.grid import BLOCK_SIZE, eager_in_user_graphs


class GridAdapter(nn.Module, LoraLayer):
    """A LoRA layer over a `GridLinear` whose forward multiplies by the deployed weight."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_steps_A", "lora_steps_B")

    def __init__(
        self,
        base_layer: GridLinear,
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
        device = base.store.steps.device
        pairs: list[tuple[nn.ModuleDict, nn.ModuleDict, int, int]] = []
        if self.rule.moves_levels:
            pairs.append((self.lora_A, self.lora_B, base.in_features, r))
        if self.rule.moves_steps:
            width = base.in_features // BLOCK_SIZE
            pairs.append((self.lora_steps_A, self.lora_steps_B, width, self.rule.steps_rank))
        for down, up, width, rank in pairs:
            down[adapter_name] = nn.Linear(width, rank, bias=False, device=device).float()
            still = nn.Linear(rank, base.out_features, bias=False, device=device).float()
            nn.init.zeros_(still.weight)
            up[adapter_name] = still
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def get_base_layer(self) -> GridLinear:
        """The layer below the adapter."""
        base = super().get_base_layer()
        assert isinstance(base, GridLinear)
        return base

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        assert isinstance(module, GridLinear)
        return module.in_features, module.out_features

    def parameters_of(self, name: str) -> Tensor | None:
        """Weight of `lora_A`, `lora_B`, `lora_steps_A` or `lora_steps_B`; None if absent or off."""
        if self.disable_adapters:
            return None
        modules = getattr(self, name)
        active = self.active_adapters[0]
        return modules[active].weight if active in modules else None

    @eager_in_user_graphs
    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] through the deployed weight, in autocast's dtype."""
        dtype = compute_dtype(x)
        bias = self.get_base_layer().bias
        if self.held_weight is not None and not torch.is_grad_enabled():
            return functional.linear(x.to(dtype), self.held_weight.to(dtype), bias)
        parameters = [self.parameters_of(name) for name in self.adapter_layer_names]
        y = DeployedLinear.apply(x.to(dtype), self, *parameters)
        return y if bias is None else y + bias


def compute_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a layer multiplies `x`: autocast's where it is on."""
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
