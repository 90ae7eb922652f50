"""A model put together from the files of a checkpoint, without the weights that lie on its grid.

The model is laid out on the meta device and filled tensor by tensor; whoever asked for it reads
the weights that were left out one at a time and puts a layer in the place of each. No dense or
second copy of them ever exists: the largest thing in memory besides the model is one tensor.
"""

from collections.abc import Collection

import torch
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel

from qatlora.base.assemble import empty_model, fill_model
from qatlora.base.intact import require_all_found
from qatlora.base.layout import plain_config
from qatlora.base.names import weight_key
from qatlora.base.nf4 import nf4_of_tensors, put_nf4
from qatlora.base.source import Source
from qatlora.errors import CheckpointError


def model_without(
    source: Source, left_out: Collection[str], device: torch.device, dtype: torch.dtype
) -> PreTrainedModel:
    """A frozen model in which some weights are missing yet (they stay on the meta device).

    Args:
        source: a checkpoint of any kind; what it stores as NF4 and is not left out, stays NF4.
        left_out: names of the lists; of a packed build all that are packed.
        device: where all other tensors go.
        dtype: of all other tensors.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or left over in a build.
    """
    model = empty_model(plain_config(source.folder), dtype)
    expected = model.state_dict()
    _require_fit(source, model, expected)
    kept_nf4 = sorted(source.nf4_modules - set(left_out))
    skipped = {weight_key(name) for name in [*left_out, *kept_nf4]}
    others = {
        key: source.tensor(key).to(device, expected[key].dtype)
        for key in source.files
        if key in expected and key not in skipped
    }
    fill_model(model, others, device)
    for name in kept_nf4:
        put_nf4(model, name, stored_nf4(source, name, device))
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model


def stored_nf4(source: Source, name: str, device: torch.device) -> Tensor:
    """Read the `Params4bit` that a build has under this name of the lists."""
    key = weight_key(name)
    return nf4_of_tensors(key, source.tensor_with_parts(key), device)


def _require_fit(source: Source, model: PreTrainedModel, expected: dict[str, Tensor]) -> None:
    """Compare names and shapes with the layout; load_state_dict would leave gaps on meta."""
    shapes = source.shapes()
    found = shapes.keys()
    tied = {key for keys in _tied_groups(model) if keys & found for key in keys}
    require_all_found(source.folder, sorted(expected.keys() - found - tied))
    coded = {weight_key(name) for name in source.packed_modules | source.nf4_modules}
    comparable = sorted(found & expected.keys() - coded)
    misfits = [key for key in comparable if shapes[key] != tuple(expected[key].shape)]
    # Such as keys and values of layers that share them, which transformers passes over, too.
    ignored = getattr(model.get_decoder(), "_keys_to_ignore_on_load_unexpected", None) or ()
    unknown = sorted(
        key for key in found - expected.keys() if not any(part in key for part in ignored)
    )
    if source.packed_modules and unknown:  # other checkpoints may hold more than a model reads
        misfits = [*unknown, *misfits]
    if misfits:
        raise CheckpointError(
            f"{source.folder} does not fit its config.json, which knows {misfits[0]} not at all or "
            f"in another shape than {list(shapes[misfits[0]])}. A file is missing or belongs to "
            "another model: copy the folder again."
        )


def _tied_groups(model: PreTrainedModel) -> list[set[str]]:
    """Names of parameters that are one and the same, such as embeddings and lm_head."""
    groups: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), set()).add(name)
    return [names for names in groups.values() if len(names) > 1]
