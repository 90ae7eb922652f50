"""Put adapters on a loaded base, and ask the adapted model for its deployed tensors."""

import contextlib
import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import PreTrainedTokenizerBase

from qatlora.adapters.deployed import AdapterRule, deployed_dense, deployed_weight
from qatlora.adapters.layer import GridAdapter
from qatlora.base.linear import GridLinear
from qatlora.base.load import LoadedBase
from qatlora.config import AdapterConfig
from qatlora.grid import Q4Blocks, digest


@dataclass(frozen=True)
class AdaptedModel:
    """A base with adapters on its trained linears.

    Attributes:
        base: the base below.
        model: the PEFT model; its trained linears are `GridAdapter`.
        rule: what, besides the parameters, decides the deployed weight.
    """

    base: LoadedBase
    model: PeftModel
    rule: AdapterRule

    def layers(self) -> Iterator[tuple[str, GridLinear | GridAdapter]]:
        """Yield (tensor name, layer) of every Q4_0 tensor in the model's order."""
        inner = self.model.get_base_model()
        for name in self.base.grid:
            layer = inner.get_submodule(name)
            assert isinstance(layer, GridLinear | GridAdapter)
            yield name, layer

    def deployed(self) -> Iterator[tuple[str, Q4Blocks]]:
        """Yield (tensor name, deployed blocks), one layer at a time."""
        for name, layer in self.layers():
            yield name, deployed_weight(layer)

    def base_blocks(self) -> Iterator[tuple[str, Q4Blocks]]:
        """Yield (tensor name, the base's own blocks)."""
        for name, layer in self.layers():
            base = layer.get_base_layer() if isinstance(layer, GridAdapter) else layer
            yield name, base.base_blocks()

    def deployed_digests(self) -> dict[str, str]:
        """Tensor name -> hex SHA-256 of its packed blocks."""
        return {name: digest(blocks) for name, blocks in self.deployed()}

    def keep_blocks(self, keep: bool) -> None:
        """Let every adapter keep its blocks from the forward to the backward pass, or not."""
        for _, layer in self.layers():
            if isinstance(layer, GridAdapter):
                layer.keeps_blocks = keep

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within this context the model is the base: adapters are off."""
        with self.model.disable_adapter():
            yield

    @contextlib.contextmanager
    def held_weights(self, dtype: torch.dtype) -> Iterator[None]:
        """Within this context each layer keeps its deployed weight, for many forwards in a row.

        It costs the bf16 size of the trained linears and saves computing them in every forward;
        forwards that record gradients still compute their own.
        """
        layers = [layer for _, layer in self.layers()]
        try:
            for layer in layers:
                layer.held_weight = deployed_dense(layer, dtype)
            yield
        finally:
            for layer in layers:
                layer.held_weight = None


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
    """Wrap every trained linear in a `GridAdapter`; a new adapter changes nothing."""
    torch.manual_seed(rule.seed)
    config = LoraConfig(
        r=rule.rank,
        lora_alpha=rule.alpha,  # type: ignore[arg-type]  # peft only keeps it: rule.scale acts
        lora_dropout=0.0,  # a dropped delta would not be the deployed one
        bias="none",
        target_modules=list(base.trained),
        task_type="CAUSAL_LM",
    )
    wrap = functools.partial(GridAdapter, rule=rule)
    config._register_custom_module({GridLinear: wrap})  # type: ignore[dict-item]  # only called
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
