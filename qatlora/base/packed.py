"""Read a packed Q4_0 build: the blocks, and the plain model that they are the weights of."""

import torch
from transformers import PreTrainedModel

from qatlora.base.names import weight_key
from qatlora.base.plain import put_blocks
from qatlora.base.source import Source
from qatlora.base.streamed import model_without
from qatlora.errors import CheckpointError
from qatlora.grid import Q4Blocks, unpack


def packed_blocks(source: Source, name: str, device: torch.device) -> Q4Blocks:
    """The blocks of one packed weight: steps [..., in / 32], levels [..., in].

    Raises:
        CheckpointError: a step is infinite or not a number.
    """
    blocks = unpack(source.tensor(weight_key(name)).to(device))
    if not bool(blocks.steps.isfinite().all()):
        raise CheckpointError(
            f"A step of {name} in {source.folder} is infinite or not a number: the file is "
            "damaged. Copy the folder again, or build it again (recipe=q4_0_build)."
        )
    return blocks


def model_unpacked(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with every packed linear decoded to `dtype`: as plain transformers has it."""
    model = model_without(source, source.packed_modules, device, dtype)
    blocks = ((name, packed_blocks(source, name, device)) for name in source.packed_modules)
    put_blocks(model, blocks, dtype)
    return model
