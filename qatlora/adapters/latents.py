"""Train a base's own weights inside the grid: every trained linear becomes a `LatentLinear`."""

import contextlib
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from qatlora.adapters.deployed import LatentRule
from qatlora.adapters.latent_layer import LatentLinear
from qatlora.adapters.model import GridModel, ParameterGroups
from qatlora.base.experts import ExpertStack
from qatlora.base.linear import GridLinear
from qatlora.base.load import LoadedBase
from qatlora.errors import AdapterError


@dataclass(frozen=True)
class LatentModel(GridModel):
    """A base whose trained linears are `LatentLinear`."""

    model: PreTrainedModel
    rule: LatentRule

    @contextlib.contextmanager
    def as_base(self) -> Iterator[None]:
        """Within this context every layer has the blocks it had before training."""
        layers = self.trained_layers()
        try:
            for layer in layers:
                layer.is_off = True
            yield
        finally:
            for layer in layers:
                layer.is_off = False

    def parameter_groups(self) -> ParameterGroups:
        """Latents, and the factors of the steps where they are learned."""
        layers = self.trained_layers()
        changes = (layer.step_change for layer in layers)
        return ParameterGroups(
            levels=[layer.latent for layer in layers],
            steps=[change for change in changes if change is not None],
            level_size=statistics.median(
                layer.steps.abs().float().median().item() for layer in layers
            ),
        )

    def trained_layers(self) -> list[LatentLinear]:
        """The layers that train, in the model's order."""
        return [layer for layer in self.trainable() if isinstance(layer, LatentLinear)]


def attach_latents(
    base: LoadedBase, rule: LatentRule, dtype: torch.dtype = torch.float32
) -> LatentModel:
    """Put a `LatentLinear` in place of every trained linear, and of every expert, of the base.

    Args:
        base: the base; its trained layers are replaced.
        rule: how the latents become blocks.
        dtype: of the latents.

    Raises:
        AdapterError: the base is not stored as bf16, so the fractions of its weights are gone.
    """
    for name in base.trained:
        layer = base.model.get_submodule(name)
        if isinstance(layer, ExpertStack):
            for number, linear in enumerate(layer.linears()):
                layer.experts[number] = _latent(linear, base, rule, dtype)
        else:
            assert isinstance(layer, GridLinear)
            base.model.set_submodule(name, _latent(layer, base, rule, dtype))
    return LatentModel(base, base.model, rule)


def _latent(
    linear: GridLinear, base: LoadedBase, rule: LatentRule, dtype: torch.dtype
) -> LatentLinear:
    weight = linear.checkpoint_weight()
    if weight is None:
        raise AdapterError(
            f"The base is stored as {base.storage}, and training its weights starts from the "
            "checkpoint's own values, which only bf16 keeps. Use storage=bf16."
        )
    return LatentLinear(linear, weight, rule, dtype)
