"""Read a packed Q4_0 build: the blocks, and a model in which nothing else is missing.

The model is laid out on the meta device and filled tensor by tensor, so that no dense copy of the
packed linears is ever made: the largest thing in memory besides the model is one tensor.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qatlora.base.assemble import empty_model, fill_model
from qatlora.base.layout import plain_config
from qatlora.base.names import weight_key
from qatlora.base.plain import put_blocks
from qatlora.base.source import Source
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


def model_without_packed(
    source: Source, device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A frozen model whose packed linears have no weight yet (it stays on the meta device).

    Args:
        source: a packed build.
        device: where all other tensors go.
        dtype: of all other tensors.

    Raises:
        CheckpointError: a tensor is missing, left over, or of another shape.
    """
    model = empty_model(plain_config(source.folder), dtype)
    others = dict(_other_tensors(source, device, dtype))
    _require_fit(source, model, others)
    fill_model(model, others, device)
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def model_unpacked(source: Source, device: torch.device, dtype: torch.dtype) -> PreTrainedModel:
    """The same model with every packed linear decoded to `dtype`: as plain transformers has it."""
    model = model_without_packed(source, device, dtype)
    blocks = ((name, packed_blocks(source, name, device)) for name in source.packed_modules)
    put_blocks(model, blocks, dtype)
    return model


def _other_tensors(
    source: Source, device: torch.device, dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    for key in source.files:
        if key.removesuffix(".weight") not in source.packed_modules:
            tensor = source.tensor(key)
            yield key, tensor.to(device, dtype if tensor.is_floating_point() else None)


def _require_fit(source: Source, model: PreTrainedModel, others: dict[str, Tensor]) -> None:
    """Compare names and shapes with the layout; load_state_dict would leave gaps on meta."""
    expected = model.state_dict()
    tied = {key for keys in _tied_groups(model) if keys & others.keys() for key in keys}
    packed = {weight_key(name) for name in source.packed_modules}
    lacking = sorted(expected.keys() - others.keys() - packed - tied)
    # Such as keys and values of layers that share them, which transformers passes over, too.
    ignored = getattr(model.get_decoder(), "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = sorted(
        key for key in others.keys() - expected.keys() if not any(part in key for part in ignored)
    )
    misfits = [
        key for key in others.keys() & expected.keys() if others[key].shape != expected[key].shape
    ]
    if lacking or unknown or misfits:
        raise CheckpointError(
            f"{source.folder} does not fit its config.json: it lacks {lacking[:2]}, has unknown "
            f"{unknown[:2]} and other shapes in {misfits[:2]}. A file is missing or belongs to "
            "another model: copy the folder again."
        )


def _tied_groups(model: PreTrainedModel) -> list[set[str]]:
    """Names of parameters that are one and the same, such as embeddings and lm_head."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]
