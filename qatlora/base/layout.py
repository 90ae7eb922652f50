"""What the three lists of an architecture select in one checkpoint, before a weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qatlora.base.architectures import (
    matching_weights,
    require_block_width,
    tensor_lists,
    weight_names,
)
from qatlora.base.experts import PLAIN_IMPLEMENTATION
from qatlora.base.names import is_stack, weight_key
from qatlora.base.source import Source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError
from qatlora.grid import BLOCK_SIZE


@dataclass(frozen=True)
class Layout:
    """What the three lists select in one checkpoint, found on the meta device.

    Attributes:
        trained: weights that get an adapter.
        nf4: weights stored as NF4 when storage=nf4.
        grid: weights that are Q4_0 in the GGUF.
        not_nf4: the other linears, which storage=nf4 leaves in bf16.
        tied: whether the embeddings and lm_head are one tensor.
        num_parameters: all parameters, tied ones once.
        num_grid_weights: numbers in the weights of `grid`.
        num_expert_weights: those of them that are in stacks of experts.
        num_active_weights: those of `grid` that a token is multiplied by; it meets few experts.
        max_grid_weights: numbers in the largest of them.
    """

    trained: tuple[str, ...]
    nf4: tuple[str, ...]
    grid: tuple[str, ...]
    not_nf4: tuple[str, ...]
    tied: bool
    num_parameters: int
    num_grid_weights: int
    num_expert_weights: int
    num_active_weights: float
    max_grid_weights: int

    @property
    def nf4_modules(self) -> tuple[str, ...]:
        """Those of `nf4` that bitsandbytes makes NF4: it knows linears, and no stacks."""
        return tuple(name for name in self.nf4 if not is_stack(name))

    def kept_as(self, name: str, storage: str) -> str:
        """How a weight of `grid` is kept: in NF4 storage those of the Q4_0 list alone stay bf16."""
        return storage if storage != "nf4" or name in self.nf4 else "bf16"


def find_layout(source: Source, settings: BaseConfig) -> Layout:
    """Apply the lists to the architecture without reading a weight.

    Raises:
        CheckpointError: unknown architecture, nothing matches, a width is no multiple of 32, or a
            build quantizes other modules than the lists say.
    """
    lists = tensor_lists(source.model_type, settings.trained)
    config = plain_config(source.folder)
    skeleton = _skeleton(config, source.folder)
    trained = matching_weights(skeleton, lists.trained)
    nf4 = _nf4_weights(source, skeleton, set(matching_weights(skeleton, lists.nf4)))
    grid = matching_weights(skeleton, lists.q4_0)
    weights = [skeleton.get_parameter(weight_key(name)) for name in grid]
    for name, weight in zip(grid, weights, strict=True):
        require_block_width(name, weight.shape[-1], BLOCK_SIZE)
    _require_packed_fit(source, grid, skeleton)
    num_grid = sum(weight.numel() for weight in weights)
    num_expert = sum(weight.numel() for weight in weights if weight.ndim == 3)
    return Layout(
        trained=tuple(trained),
        nf4=tuple(nf4),
        grid=tuple(grid),
        not_nf4=tuple(
            name for name in weight_names(skeleton) if not is_stack(name) and name not in nf4
        ),
        # Asked of the model: config.json may be silent about it, as Gemma's is.
        tied=skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight,
        num_parameters=sum(p.numel() for p in skeleton.parameters()),
        num_grid_weights=num_grid,
        num_expert_weights=num_expert,
        num_active_weights=num_grid - num_expert * (1 - _routed_share(config)),
        max_grid_weights=max(weight.numel() for weight in weights),
    )


def plain_config(folder: Path) -> PreTrainedConfig:
    """The configuration without marks of quantization, on which transformers would act.

    Raises:
        CheckpointError: transformers cannot read it.
    """
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as problem:  # transformers raises many classes for one cause
        raise _unusable_config(folder, problem) from problem
    config._experts_implementation = PLAIN_IMPLEMENTATION
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _skeleton(config: PreTrainedConfig, folder: Path) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    except Exception as problem:  # a size that is none can fail anywhere in the model's code
        raise _unusable_config(folder, problem) from problem
    return model


def _unusable_config(folder: Path, problem: Exception) -> CheckpointError:
    reason = (str(problem).strip().splitlines() or ["no reason given"])[0]
    return CheckpointError(
        f"transformers can make no model of {folder / 'config.json'} ({type(problem).__name__}: "
        f"{reason}). The file is damaged, or calls for code of its own, which is never run: fetch "
        "it again."
    )


def _routed_share(config: PreTrainedConfig) -> float:
    """Share of the experts that a token is sent to; 1 of a dense model."""
    text = config.get_text_config()
    if not getattr(text, "enable_moe_block", False):
        return 1.0
    return float(text.top_k_experts / text.num_experts)


def _nf4_weights(source: Source, skeleton: PreTrainedModel, wanted: set[str]) -> list[str]:
    """The NF4 list in the model's order; of a build also what it quantized outside of the text."""
    found = wanted | source.nf4_modules
    if source.nf4_modules:
        head = skeleton.get_output_embeddings()
        text = {*skeleton.get_decoder().modules(), head}
        extra = sorted(name for name in found - wanted if skeleton.get_submodule(name) in text)
        _require_same_nf4(source, {name for name in wanted if not is_stack(name)}, extra)
    return [name for name in weight_names(skeleton) if name in found]


def _require_same_nf4(source: Source, wanted: set[str], extra: list[str]) -> None:
    lacking = sorted(wanted - source.nf4_modules)
    if not extra and not lacking:
        return
    example = f"it quantizes {extra[0]}" if extra else f"it leaves {lacking[0]} unquantized"
    raise CheckpointError(
        f"{source.folder} stores {len(source.nf4_modules)} modules as NF4 and the list of its "
        f"architecture has {len(wanted)}: {example}. On a pre-quantized checkpoint the stored list "
        "wins silently, so it is refused: build it again from the bf16 checkpoint (storage=nf4), "
        "which quantizes the decoder linears only."
    )


def _require_packed_fit(source: Source, grid: list[str], skeleton: nn.Module) -> None:
    """A packed build must fit its own config.json and the Q4_0 list in force."""
    if extra := sorted(source.packed_modules - set(grid)):
        raise CheckpointError(
            f"{source.folder} holds {extra[0]} as packed Q4_0, which is not in the Q4_0 list: it "
            "was built with another base.trained. Give the same base.trained as for the build."
        )
    for name in source.packed_modules:
        num_blocks = skeleton.get_parameter(weight_key(name)).numel() // BLOCK_SIZE
        if source.record is not None and source.record.blocks[name] != num_blocks:
            raise CheckpointError(
                f"{name} in {source.folder} holds {source.record.blocks[name]} blocks of "
                f"{BLOCK_SIZE}, and its config.json calls for {num_blocks}: they belong to other "
                "models. Copy the folder again."
            )
