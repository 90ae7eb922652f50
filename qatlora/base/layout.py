"""What the three lists of an architecture select in one checkpoint, before a weight is read."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qatlora.base.architectures import matching_linears, require_block_width, tensor_lists
from qatlora.base.source import Source
from qatlora.config import BaseConfig
from qatlora.errors import CheckpointError
from qatlora.grid import BLOCK_SIZE


@dataclass(frozen=True)
class Layout:
    """What the three lists select in one checkpoint, found on the meta device.

    Attributes:
        trained: modules that get an adapter.
        nf4: modules stored as NF4 when storage=nf4.
        grid: modules that are Q4_0 in the GGUF.
        not_nf4: the other linears, which storage=nf4 leaves in bf16.
        tied: whether the embeddings and lm_head are one tensor.
        num_parameters: all parameters, tied ones once.
        num_grid_weights: weights of the modules in `grid`.
        max_grid_weights: weights of the largest of them.
    """

    trained: tuple[str, ...]
    nf4: tuple[str, ...]
    grid: tuple[str, ...]
    not_nf4: tuple[str, ...]
    tied: bool
    num_parameters: int
    num_grid_weights: int
    max_grid_weights: int


def find_layout(source: Source, settings: BaseConfig) -> Layout:
    """Apply the lists to the architecture without reading a weight.

    Raises:
        CheckpointError: unknown architecture, nothing matches, a width is no multiple of 32, or a
            build quantizes other modules than the lists say.
    """
    lists = tensor_lists(source.model_type, settings.trained)
    config = plain_config(source.folder)
    require_dense(config, str(source.folder))
    skeleton = _skeleton(config, source.folder)
    trained = matching_linears(skeleton, lists.trained)
    nf4 = _nf4_modules(source, skeleton, set(matching_linears(skeleton, lists.nf4)))
    grid = matching_linears(skeleton, lists.q4_0)
    for name in grid:
        require_block_width(name, skeleton.get_submodule(name).in_features, BLOCK_SIZE)
    _require_packed_fit(source, grid, skeleton)
    sizes = [skeleton.get_submodule(name).weight.numel() for name in grid]
    return Layout(
        trained=tuple(trained),
        nf4=tuple(nf4),
        grid=tuple(grid),
        not_nf4=tuple(
            name
            for name, module in skeleton.named_modules()
            if isinstance(module, nn.Linear) and name not in nf4
        ),
        # Asked of the model: config.json may be silent about it, as Gemma's is.
        tied=skeleton.get_input_embeddings().weight is skeleton.get_output_embeddings().weight,
        num_parameters=sum(p.numel() for p in skeleton.parameters()),
        num_grid_weights=sum(sizes),
        max_grid_weights=max(sizes),
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


def require_dense(config: PreTrainedConfig, name: str) -> None:
    """Refuse a mixture of experts.

    Raises:
        CheckpointError: it is one.
    """
    text = config.get_text_config()
    if getattr(text, "enable_moe_block", False):
        raise CheckpointError(
            f"{name} is a mixture of {text.num_experts} experts, whose weights are one "
            "tensor per layer that is no linear module, so they could be neither trained nor kept "
            "as Q4_0. Use a dense checkpoint of the family."
        )


def _nf4_modules(source: Source, skeleton: PreTrainedModel, wanted: set[str]) -> list[str]:
    """The NF4 list in the model's order; of a build also what it quantized outside of the text."""
    found = wanted | source.nf4_modules
    if source.nf4_modules:
        head = skeleton.get_output_embeddings()
        text = {*skeleton.get_decoder().modules(), head}
        extra = sorted(name for name in found - wanted if skeleton.get_submodule(name) in text)
        _require_same_nf4(source, wanted, extra)
    return [name for name, _ in skeleton.named_modules() if name in found]


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
        linear = skeleton.get_submodule(name)
        num_blocks = linear.weight.numel() // BLOCK_SIZE
        if source.record is not None and source.record.blocks[name] != num_blocks:
            raise CheckpointError(
                f"{name} in {source.folder} holds {source.record.blocks[name]} blocks of "
                f"{BLOCK_SIZE}, and its config.json calls for {num_blocks}: they belong to other "
                "models. Copy the folder again."
            )
