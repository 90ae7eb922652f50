"""Every kind of model as a plain transformers model: one forward for all, only weights differ.

Quantized linears are decoded once, so that what is measured is what a storage does to the weights
and not how some kernel multiplies by them. A model that runs elsewhere (in llama.cpp itself) needs
none of this: it only has to leave `TokenScores` of the same tokens.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from qatlora.adapters.saved import load_adapter, read_identity
from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.load import load_base, load_nf4, load_plain
from qatlora.base.names import weight_key
from qatlora.base.nf4 import dequantized_nf4, quantized_nf4
from qatlora.base.others import deploy_others
from qatlora.base.plain import put_blocks, put_weight
from qatlora.base.stores import CODE_BITS, Q4_0_BITS
from qatlora.base.to_q4_0 import by_grid, by_llama_cpp
from qatlora.config import Storage, StorageConfig
from qatlora.fidelity.plan import AdapterRun, Checkpoint, GgufModel, Place

BEFORE = ", before"
"""Behind the name of an adapter run: its base, as it was before training."""

_ENCODERS = {"q4_0": by_grid, "q4_0_reference": by_llama_cpp}
# As shipped: an NF4 file in the public layout has no steps.
_BITS = {"nf4": CODE_BITS["nf4"], "q4_0": Q4_0_BITS, "q4_0_reference": Q4_0_BITS}
_BF16_BITS = 16


@dataclass(frozen=True)
class LoadSettings:
    """Where models go and what they are computed in.

    Attributes:
        device: of all models.
        dtype: of all weights, bfloat16 or float32; float32 holds every Q4_0 weight exactly.
        other_type: type of the embeddings in the GGUF of an adapter run.
    """

    device: torch.device
    dtype: torch.dtype
    other_type: str


@dataclass(frozen=True)
class LoadedModel:
    """A model in memory.

    Attributes:
        suffix: what is added to its name.
        model: a plain causal LM.
        num_bytes: of its weights where they are kept or shipped, not here.
    """

    suffix: str
    model: PreTrainedModel
    num_bytes: int


def load_models(
    place: Place, settings: LoadSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[LoadedModel]:
    """Load one model after the other: one for each place, two for an adapter run.

    Whoever takes one must let go of it before the next.

    Raises:
        CheckpointError: it cannot be loaded.
        AdapterError: the adapter belongs to another base.
    """
    if isinstance(place, GgufModel):
        model = model_from_gguf(place.path, place.config, settings.dtype).to(settings.device)
        yield LoadedModel("", model, place.path.stat().st_size)
    elif isinstance(place, AdapterRun):
        yield from _before_and_after(place, settings, tokenizer)
    else:
        yield LoadedModel("", _checkpoint(place, settings), _checkpoint_bytes(place))


def _checkpoint(place: Checkpoint, settings: LoadSettings) -> PreTrainedModel:
    source, layout = place.source, place.layout
    if place.storage == "nf4" or source.nf4_modules:
        model = load_nf4(source, layout, settings.device)
        for name in layout.nf4 if place.storage == "nf4" else layout.nf4_modules:
            put_weight(model, name, _of_nf4(model.get_parameter(weight_key(name))))
        return model.to(settings.dtype) if settings.dtype == torch.float32 else model
    model = load_plain(source.folder, settings.device, settings.dtype)
    is_stored_so = place.storage == "q4_0" and bool(source.packed_modules)
    if place.storage in _ENCODERS and not is_stored_so:
        blocks = _ENCODERS[place.storage](source, layout.grid, settings.device)
        put_blocks(model, blocks, settings.dtype)
    return model


def _of_nf4(held: Tensor) -> Tensor:
    """What NF4 makes of a weight; experts, which are loaded in bf16, are quantized here."""
    if hasattr(held, "quant_state"):
        return dequantized_nf4(held)
    return torch.stack([dequantized_nf4(quantized_nf4(matrix)) for matrix in held])


def _before_and_after(
    place: AdapterRun, settings: LoadSettings, tokenizer: PreTrainedTokenizerBase
) -> Iterator[LoadedModel]:
    source, layout = place.base.source, place.base.layout
    storage = StorageConfig(kind=Storage[read_identity(place.folder).base_storage])
    base = load_base(source, layout, storage, settings.device, tokenizer)
    adapted, _ = load_adapter(base, place.folder)
    model = _checkpoint(Checkpoint(source, layout, None), settings)
    deploy_others(model, layout.grid, settings.other_type)
    num_bytes = _deployed_bytes(model, place.base, settings.other_type)
    put_blocks(model, adapted.base_blocks(), settings.dtype)
    yield LoadedModel(BEFORE, model, num_bytes)
    put_blocks(model, adapted.deployed(), settings.dtype)
    yield LoadedModel("", model, num_bytes)


def _checkpoint_bytes(place: Checkpoint) -> int:
    """Size of the files as they are, or what the storage asked for would take, all else in bf16."""
    bits = _BITS.get(place.storage or "")
    if bits is None or place.source.nf4_modules or place.source.packed_modules:
        return place.source.weight_bytes
    layout = place.layout
    others = layout.num_parameters - layout.num_grid_weights
    return round((others * _BF16_BITS + layout.num_grid_weights * bits) / 8)


def _deployed_bytes(model: PreTrainedModel, base: Checkpoint, other_type: str) -> int:
    """As in the GGUF: Q4_0, embeddings as `other_type`, norms F32."""
    block_size, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[other_type.upper()]]
    layers = (model.get_input_embeddings(), model.get_output_embeddings())
    embeddings = sum({id(layer.weight): layer.weight.numel() for layer in layers}.values())
    layout = base.layout
    rest = layout.num_parameters - layout.num_grid_weights - embeddings
    return round(
        layout.num_grid_weights * Q4_0_BITS / 8 + embeddings * block_bytes / block_size + rest * 4
    )
