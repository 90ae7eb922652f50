"""The bf16 teacher of a base: its own checkpoint, or another one of the same vocabulary."""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from qatlora.base.grids import ON_GRID_SHARE
from qatlora.base.load import LoadedBase, load_plain, load_tokenizer
from qatlora.base.source import Source
from qatlora.errors import ConfigError


def load_teacher(base: LoadedBase, path: str | None, device: torch.device) -> PreTrainedModel:
    """Load `path`, or the base's own checkpoint where that still holds bf16 values.

    Raises:
        ConfigError: the base holds none, or the vocabularies differ.
        CheckpointError: transformers cannot load it.
    """
    if path is None:
        require_bf16_values(base.source)
        return load_plain(base.source.folder, device, torch.bfloat16)
    folder = Path(path)
    if load_tokenizer(folder).get_vocab() != base.tokenizer.get_vocab():
        raise ConfigError(
            f"The teacher in {folder} has another vocabulary than the base, and probabilities of "
            "different tokens cannot be compared. Take a teacher of the same family."
        )
    return load_plain(folder, device, torch.bfloat16)


def has_bf16_values(source: Source) -> bool:
    """Whether the folder still holds, or decodes to, the bf16 values of its checkpoint."""
    record = source.record
    rounded = record is not None and record.on_grid_share < ON_GRID_SHARE
    return not source.nf4_modules and not (source.packed_modules and rounded)


def require_bf16_values(source: Source) -> None:
    """A packed build of weights on a grid decodes to its source's; any other build does not.

    Raises:
        ConfigError: the source has no bf16 values (any more).
    """
    if source.nf4_modules:
        raise ConfigError(
            f"{source.folder} is an NF4 build, so it holds no bf16 teacher. Give "
            "teacher.path=FOLDER of the bf16 checkpoint, or train without one (teacher=none)."
        )
    record = source.record
    if record is not None and not has_bf16_values(source):
        raise ConfigError(
            f"{source.folder} is a packed Q4_0 build, and of its source's weights only "
            f"{record.on_grid_share:.2%} lay on a grid: their bf16 values are gone, and the base "
            "would be its own teacher. Give teacher.path=FOLDER of the bf16 checkpoint, or train "
            "without one (teacher=none)."
        )
