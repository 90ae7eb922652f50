"""Put adapters on a loaded base, and ask the adapted model for its deployed tensors."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model

from qatlora.adapters.deployed import AdapterRule
from qatlora.adapters.expert_layer import StackAdapter
from qatlora.adapters.layer import GridAdapter
from qatlora.adapters.model import BaseLayer, GridModel, ParameterGroups
from qatlora.base.experts import ExpertStack
from qatlora.base.linear import GridLinear
from qatlora.base.load import LoadedBase
from qatlora.config import AdapterConfig
from qatlora.grid import Q4Blocks


@dataclass(frozen=True)
class AdaptedModel(GridModel):
    """A base with adapters on its trained weights: `GridAdapter`, and `StackAdapter` of experts."""

    model: PeftModel
    rule: AdapterRule

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within this context the model is the base: adapters are off."""
        with self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def as_checkpoint(self) -> Iterator[None]:
        """Within this context, without gradients, adapters and grid are off.

        Nothing is copied. A base stored as bf16 multiplies by the checkpoint's weights; a packed
        one by its blocks, which on a grid is the same. Embeddings stay as deployed.
        """
        held = [(layer, layer.held_weight) for _, layer in self.layers()]
        try:
            for layer, _ in held:
                base = layer if isinstance(layer, BaseLayer) else layer.get_base_layer()
                layer.held_weight = base.checkpoint_weight()
            with self.model.disable_adapter():
                yield
        finally:
            for layer, weight in held:
                layer.held_weight = weight

    def parameter_groups(self) -> ParameterGroups:
        """The factors of the levels and those of the steps."""
        groups = ParameterGroups([], [])
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad:
                (groups.steps if "lora_steps_" in name else groups.levels).append(parameter)
        return groups


def adapter_rule(settings: AdapterConfig, seed: int) -> AdapterRule:
    """The settings as the rule that, with the parameters, decides the deployed weight."""
    return AdapterRule(
        kind=settings.kind.name,
        rank=settings.rank,
        alpha=settings.alpha,
        steps_rank=settings.steps_rank or settings.rank,
        rounding=settings.rounding.name,
        dither=settings.dither.name,
        seed=seed,
    )


def attach(base: LoadedBase, rule: AdapterRule) -> AdaptedModel:
    """Wrap the layer of every trained weight in an adapter; a new one changes nothing."""
    torch.manual_seed(rule.seed)
    config = LoraConfig(
        r=rule.rank,
        lora_alpha=rule.alpha,  # type: ignore[arg-type]  # peft only keeps it: rule.scale acts
        lora_dropout=0.0,  # a dropped delta would not be the deployed one
        bias="none",
        target_modules=list(base.trained),
        task_type="CAUSAL_LM",
    )
    wrapped = {GridLinear: GridAdapter, ExpertStack: StackAdapter}
    for layer, adapter in wrapped.items():
        wrap = functools.partial(adapter, rule=rule)
        config._register_custom_module({layer: wrap})  # type: ignore[dict-item]  # only called
    model = get_peft_model(base.model, config)
    return AdaptedModel(base, model, rule)


@dataclass(frozen=True)
class Change:
    """How many of a tensor's levels and steps changed, and which shares these are."""

    num_levels: int
    num_steps: int
    levels_share: float
    steps_share: float


def changed_share(before: Q4Blocks, after: Q4Blocks) -> Change:
    """Compare two deployed tensors; steps by bit pattern."""
    levels = before.levels != after.levels
    steps = before.steps.view(torch.int16) != after.steps.view(torch.int16)
    num_levels, num_steps = int(levels.sum()), int(steps.sum())
    return Change(num_levels, num_steps, num_levels / levels.numel(), num_steps / steps.numel())
