"""The three lists per architecture: which tensors are trained, stored in NF4, and Q4_0 in the GGUF.

A name is the module's name in the loaded transformers model, without ``.weight``, or that of a
stack of experts (see `names`). The patterns are anchored at both ends, because a vision tower has
layers with the same last names. Towers, projectors, routers, embeddings and lm_head are in no list:
they stay as they are.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn
from transformers import PreTrainedModel

from qatlora.base.names import is_stack
from qatlora.errors import CheckpointError

_DECODER_LINEARS = r"(self_attn\.(q|k|v|o)_proj|mlp\.(gate|up|down)_proj)"
# Gemma 4 E2B and E4B feed an embedding of its own into each layer. llama.cpp stores the two
# matrices of that path as Q4_0, too (with them Google's E2B file has 205 + 70 such tensors), but
# nothing about a task is learned there.
_PER_LAYER_LINEARS = r"(per_layer_input_gate|per_layer_projection)"
# Gemma 4 26B-A4B: beside the MLP, 128 experts in two stacks per layer.
_EXPERTS = r"experts\.(gate_up|down)_proj"


@dataclass(frozen=True)
class TensorLists:
    """Patterns over full module names; `fullmatch` decides."""

    trained: str
    nf4: str
    q4_0: str


def _decoder_lists(prefix: str, *, experts: bool = False, per_layer: bool = False) -> TensorLists:
    """Linears and experts of the decoder are in all three lists, per-layer inputs in the last."""
    layer = rf"{prefix}layers\.\d+\."
    weights = f"({_DECODER_LINEARS}|{_EXPERTS})" if experts else _DECODER_LINEARS
    decoder = rf"{layer}{weights}"
    q4_0 = rf"{decoder}|{layer}{_PER_LAYER_LINEARS}" if per_layer else decoder
    return TensorLists(trained=decoder, nf4=decoder, q4_0=q4_0)


_TEXT, _MULTIMODAL = r"model\.", r"model\.language_model\."

# Keyed by `model_type` of config.json; Gemma 4 12B is gemma4_unified.
ARCHITECTURES: dict[str, TensorLists] = {
    "gemma3_text": _decoder_lists(_TEXT),
    "gemma3": _decoder_lists(_MULTIMODAL),
    "gemma4_text": _decoder_lists(_TEXT, experts=True, per_layer=True),
    "gemma4": _decoder_lists(_MULTIMODAL, experts=True, per_layer=True),
    "gemma4_unified": _decoder_lists(_MULTIMODAL),
    "llama": _decoder_lists(_TEXT),
}


def tensor_lists(model_type: str, trained: list[str] | None = None) -> TensorLists:
    """The lists of an architecture; `trained` (regular expressions) replaces the trained list.

    Raises:
        CheckpointError: the architecture is unknown.
    """
    lists = ARCHITECTURES.get(model_type)
    if lists is None:
        raise CheckpointError(
            f"The checkpoint's model_type is '{model_type}', and the tensor lists are known only "
            f"for {', '.join(sorted(ARCHITECTURES))}. Use a checkpoint of one of these, or add the "
            "architecture's lists to qatlora/base/architectures.py."
        )
    if not trained:
        return lists
    pattern = "|".join(f"(?:{one})" for one in trained)
    return TensorLists(trained=pattern, nf4=lists.nf4, q4_0=f"{lists.q4_0}|{pattern}")


def weight_names(model: PreTrainedModel) -> Iterator[str]:
    """Names that a list may hold, in the model's order: linear modules and stacks of experts."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            yield name
        for key, _ in module.named_parameters(prefix=name, recurse=False):
            if is_stack(key):
                yield key


def matching_weights(model: PreTrainedModel, pattern: str) -> list[str]:
    """The `weight_names` that match in full.

    Raises:
        CheckpointError: nothing matches, the output matrix matches, or the pattern is no regular
            expression.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise CheckpointError(
            f"base.trained holds '{pattern}', which is no regular expression ({problem}). "
            "Give patterns over full module names, such as 'model.layers.[0-9]+.mlp.up_proj'."
        ) from None
    known = list(weight_names(model))
    names = [name for name in known if compiled.fullmatch(name)]
    if not names:
        raise CheckpointError(
            f"No linear module matches '{pattern}', so there would be nothing to train. The "
            "pattern must match a full module name; this model has, for example, "
            f"{', '.join(known[:3])}."
        )
    head = model.get_output_embeddings()
    if any(not is_stack(name) and model.get_submodule(name) is head for name in names):
        raise CheckpointError(
            f"'{pattern}' matches the output matrix, which is never trained: it is exported with "
            "the embeddings (export.other_type), and losses and evaluation multiply by it in "
            "chunks. Leave it out of base.trained."
        )
    return names


def require_block_width(name: str, in_features: int, block_size: int) -> None:
    """Refuse a module whose rows cannot be cut into whole blocks.

    Raises:
        CheckpointError: `in_features` is no multiple of `block_size`.
    """
    if in_features % block_size:
        raise CheckpointError(
            f"{name} has {in_features} input features, and Q4_0 cuts every row into blocks of "
            f"{block_size}: {in_features} is no multiple of it; use a checkpoint whose widths "
            "are multiples of 32."
        )
