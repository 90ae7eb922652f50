"""`GridModel`: a model whose Q4_0 tensors can be asked for their deployed blocks.

What trains it is told apart below: adapters over a fixed base (`attach`), or the base's own latent
weights (`latents`). Training, evaluation, guard and export know only what stands here.
"""

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatlora.adapters.deployed import AdapterRule, LatentRule, deployed_weight
from qatlora.adapters.expert_layer import StackAdapter
from qatlora.adapters.latent_layer import LatentLinear
from qatlora.adapters.layer import GridAdapter
from qatlora.base.experts import ExpertStack, stacked
from qatlora.base.linear import GridLinear
from qatlora.base.load import LoadedBase
from qatlora.grid import Q4Blocks, decode, digest, settle

BaseLayer = GridLinear | ExpertStack
GridLayer = BaseLayer | GridAdapter | StackAdapter | LatentLinear


@dataclass(frozen=True)
class ParameterGroups:
    """The trainable parameters by what they move.

    Attributes:
        levels: latents or their low-rank factors.
        steps: what moves the steps; empty where they stay.
        level_size: what their rate is a share of: of latents the size of a level, as Adam moves
            a weight by about the rate, and what counts is how many levels that is.
    """

    levels: list[nn.Parameter]
    steps: list[nn.Parameter]
    level_size: float = 1.0


@dataclass(frozen=True)
class GridModel(ABC):
    """A model with trainable layers on the Q4_0 grid.

    Attributes:
        base: the base below; `base.model` is the transformers model inside `model`.
        model: what runs and trains.
        rule: what, besides the parameters, decides the deployed weight.
    """

    base: LoadedBase
    model: PeftModel | PreTrainedModel
    rule: AdapterRule | LatentRule

    @abstractmethod
    def as_base(self) -> contextlib.AbstractContextManager[None]:
        """Within this context the model is what it was before training."""

    @abstractmethod
    def parameter_groups(self) -> ParameterGroups:
        """The trainable parameters."""

    def layers(self) -> Iterator[tuple[str, GridLayer]]:
        """Yield (tensor name, layer) of every Q4_0 tensor in the model's order."""
        for name in self.base.grid:
            layer = self.base.model.get_submodule(name)
            assert isinstance(layer, GridLayer)
            yield name, layer

    def trainable(self) -> Iterator[GridAdapter | StackAdapter | LatentLinear]:
        """Yield every layer with parameters; in a stack of the base these are single experts."""
        for _, layer in self.layers():
            for part in layer.linears() if isinstance(layer, ExpertStack) else [layer]:
                if not isinstance(part, BaseLayer):
                    yield part

    def deployed(self) -> Iterator[tuple[str, Q4Blocks]]:
        """Yield (tensor name, deployed blocks), one layer at a time."""
        for name, layer in self.layers():
            yield name, deployed_weight(layer)

    def base_blocks(self) -> Iterator[tuple[str, Q4Blocks]]:
        """Yield (tensor name, the blocks before training)."""
        for name, layer in self.layers():
            yield name, _before_training(layer)

    def deployed_digests(self) -> dict[str, str]:
        """Tensor name -> hex SHA-256 of its packed blocks."""
        return {name: digest(blocks) for name, blocks in self.deployed()}

    def keep_blocks(self, keep: bool) -> None:
        """Let every trained layer keep its blocks from forward to backward pass, or not."""
        for layer in self.trainable():
            layer.keeps_blocks = keep

    def settle(self) -> None:
        """Fix trained weights, once training is over, to blocks that a bf16 checkpoint keeps.

        What training multiplied by in bf16 stays bit for bit. Adapters deploy what they deploy.
        """
        for layer in self.trainable():
            if isinstance(layer, LatentLinear):
                layer.settled = settle(deployed_weight(layer))

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The base's tokenizer."""
        return self.base.tokenizer

    @property
    def num_trainable(self) -> int:
        """Number of trainable parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    @contextlib.contextmanager
    def held_weights(
        self, dtype: torch.dtype, blocks: Iterable[tuple[str, Q4Blocks]] | None = None
    ) -> Iterator[None]:
        """Within this context each layer keeps a decoded weight, for many forwards in a row.

        It costs the bf16 size of the trained linears and saves computing them in every forward;
        forwards that record gradients still compute their own.

        Args:
            dtype: of the decoded weights.
            blocks: (tensor name, blocks) to hold, of another model of this shape; None: the
                deployed ones.
        """
        layers = dict(self.layers())
        try:
            for name, held in self.deployed() if blocks is None else blocks:
                layers[name].held_weight = decode(held, dtype)
            yield
        finally:
            for layer in layers.values():
                layer.held_weight = None


def _before_training(layer: GridLayer) -> Q4Blocks:
    if isinstance(layer, ExpertStack):
        return stacked(_before_training(expert) for expert in layer.linears())
    base = layer if isinstance(layer, GridLinear) else layer.get_base_layer()
    return base.base_blocks()
