"""GGUF files as transformers models: Gemma 3 and Llama-shaped ones, and Gemma 4 files of our own.

transformers' own route parses the file with gguf.GGUFReader several times (minutes for a
vocabulary of 262,144) and leaves a quantization_config behind that forbids saving and training.

Three differences between the two formats are undone here, and a test compares the result with
transformers' own:

- names (`blk.0.attn_q.weight` is `model.layers.0.self_attn.q_proj.weight`);
- Gemma 3's norms: llama.cpp stores 1 + weight;
- Llama's rotary embedding: llama.cpp rotates neighbouring pairs, transformers the two halves of a
  head, so the converter interleaves the rows of q_proj and k_proj.
"""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from qatlora.base.assemble import empty_model, fill_model
from qatlora.base.experts import matrices, put_layer
from qatlora.base.gguf_config import gemma3_config, llama_config
from qatlora.base.stores import Q4Store
from qatlora.errors import CheckpointError
from qatlora.grid import unpack
from qatlora.llamacpp.gguf_read import GgufFile, GgufTensor, dequantize, read_gguf

_CHUNK_WEIGHTS = 1 << 24
_STAMP = "qatlora.version"  # in the metadata of every file that we export
_LAYER_NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
}
_LLAMA_NAMES = _LAYER_NAMES | {"post_attention_layernorm": "ffn_norm"}
_GEMMA3_NAMES = _LAYER_NAMES | {
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
_GEMMA4_NAMES = _GEMMA3_NAMES | {
    "pre_feedforward_layernorm_2": "pre_ffw_norm_2",
    "post_feedforward_layernorm_1": "post_ffw_norm_1",
    "post_feedforward_layernorm_2": "post_ffw_norm_2",
    "router.proj": "ffn_gate_inp",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
# Of parameters and buffers that are no module's weight or bias.
_BARE_NAMES = {
    "layer_scalar": "layer_output_scale.weight",
    "experts.gate_up_proj": "ffn_gate_up_exps.weight",
    "experts.down_proj": "ffn_down_exps.weight",
    "router.scale": "ffn_gate_inp.scale",
    "router.per_expert_scale": "ffn_down_exps.scale",
}
_TOP_NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "model.embed_tokens_per_layer": "per_layer_token_embd",
    "model.per_layer_model_projection": "per_layer_model_proj",
    "model.per_layer_projection_norm": "per_layer_proj_norm",
}


@dataclasses.dataclass(frozen=True)
class Architecture:
    """How a GGUF architecture maps to transformers.

    model_types: of the transformers configurations that it can be loaded with.
    layer_names: of the modules of one decoder layer, HF to GGUF.
    norm_shift: what llama.cpp adds to the weights of norms.
    interleaved: whether the rows of q_proj and k_proj are interleaved in the GGUF.
    make_config: metadata to configuration class; None if only files of our own can be loaded,
        beside the configuration of their checkpoint.
    """

    model_types: tuple[str, ...]
    layer_names: dict[str, str]
    norm_shift: float
    interleaved: bool
    make_config: Callable[[GgufFile], PreTrainedConfig] | None


def config_from_gguf(gguf: GgufFile, beside: PreTrainedConfig | None = None) -> PreTrainedConfig:
    """The configuration that transformers needs to run this file.

    Args:
        gguf: the file.
        beside: of the checkpoint that it is compared with, for files of our own that have none.

    Raises:
        CheckpointError: the architecture is not supported, or a metadata key is missing.
    """
    make_config = _architecture(gguf).make_config
    if make_config is None:
        if beside is not None and _STAMP in gguf.metadata:
            return beside
        raise CheckpointError(
            f"{gguf.path} is a Gemma 4 model, and of those only qatlora's own exports are read, "
            "beside their checkpoint: such a file has neither towers nor bf16 values, and what "
            "another writer did with its embeddings, scalars and tokenizer is not known. Give the "
            "Hugging Face folder instead (as a base base.path=FOLDER)."
        )
    config = make_config(gguf)
    config.dtype = torch.bfloat16
    return config


def require_fit(gguf: GgufFile, config: PreTrainedConfig) -> None:
    """As `weights_from_gguf`, but only what headers tell: raises where a tensor has no place."""
    _matched(gguf, config.get_text_config(), _architecture(gguf))


def weights_from_gguf(
    gguf: GgufFile, config: PreTrainedConfig, dtype: torch.dtype
) -> dict[str, Tensor]:
    """All parameters of the model by HF name, decoded in fp32 and rounded once to `dtype`.

    Tied embeddings appear once. `config` may belong to another copy of the model (the folder that
    the GGUF was exported from); for a multimodal one its text part counts.

    Raises:
        CheckpointError: a parameter is missing, has another shape, or a tensor is left over.
    """
    config = config.get_text_config()
    architecture = _architecture(gguf)
    tensors = _matched(gguf, config, architecture)
    return {
        name: _decode(tensor, name, config, architecture, dtype) for name, tensor in tensors.items()
    }


def model_from_gguf(path: Path, config: PreTrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """Load a GGUF file as a transformers model, every parameter filled from the file.

    Args:
        path: a GGUF file of a Gemma (text) or Llama-shaped model.
        config: of the HF folder it was exported from, or `config_from_gguf`.
        dtype: of all parameters; float32 represents every Q4_0 and Q8_0 weight exactly.

    Raises:
        CheckpointError: as `weights_from_gguf`.
    """
    text_config = config.get_text_config()
    weights = weights_from_gguf(read_gguf(path), text_config, dtype)
    model: PreTrainedModel = type(_on_meta(text_config)).from_pretrained(
        None, config=text_config, state_dict=weights, dtype=dtype
    )
    model.eval()
    return model


def packed_model_from_gguf(
    path: Path, config: PreTrainedConfig, dtype: torch.dtype
) -> PreTrainedModel:
    """As `model_from_gguf`, but Q4_0 tensors stay packed, 4.5 bits per weight.

    The same model to the last bit, slower, in a quarter of the memory.

    Raises:
        CheckpointError: as `weights_from_gguf`.
    """
    gguf, config = read_gguf(path), config.get_text_config()
    architecture = _architecture(gguf)
    model, others = empty_model(config, dtype), {}
    for name, tensor in _matched(gguf, config, architecture).items():
        if tensor.type_name == "Q4_0":
            rows = _in_our_order(torch.from_numpy(tensor.data.copy()), name, config, architecture)
            stores = [Q4Store(matrix) for matrix in matrices(unpack(rows))]
            put_layer(model, name.removesuffix(".weight"), stores)
        else:
            others[name] = _decode(tensor, name, config, architecture, dtype)
    return fill_model(model, others, torch.device("cpu"))


def _matched(
    gguf: GgufFile, config: PreTrainedConfig, architecture: Architecture
) -> dict[str, GgufTensor]:
    """HF name -> tensor of the file, every one in its place."""
    if config.model_type not in architecture.model_types:
        raise CheckpointError(
            f"{gguf.path} is a {architecture.model_types[0]} model, but it is loaded with a "
            f"configuration of {config.model_type}: give the configuration it was exported with."
        )
    unused = dict(gguf.tensors)
    unused.pop("rope_freqs.weight", None)  # follows from the configuration
    matched = {}
    for name, shape in _expected_shapes(config).items():
        gguf_name = _gguf_name(name, architecture)
        tensor = unused.pop(gguf_name, None)
        if tensor is None or tensor.shape != shape:
            found = "no such tensor" if tensor is None else f"the shape {list(tensor.shape)}"
            raise CheckpointError(
                f"{gguf.path} has {found} where {gguf_name} (in transformers {name}) should have "
                f"the shape {list(shape)}: the file and its configuration do not belong together."
            )
        matched[name] = tensor
    if unused:
        raise CheckpointError(
            f"{gguf.path} has tensors that a {config.model_type} model does not know "
            f"({', '.join(sorted(unused)[:4])}{', ...' if len(unused) > 4 else ''}): it is a "
            "variant that cannot be loaded; give the HF folder of the model instead."
        )
    return matched


def _architecture(gguf: GgufFile) -> Architecture:
    name = gguf.require("general.architecture")
    if name not in _ARCHITECTURES:
        known = (key for key, one in _ARCHITECTURES.items() if one.make_config is not None)
        raise CheckpointError(
            f"{gguf.path} is of the architecture {name!r}; GGUF files can be loaded of "
            f"{' and '.join(known)}: give the HF folder of the model instead."
        )
    return _ARCHITECTURES[name]


def _expected_shapes(config: PreTrainedConfig) -> dict[str, tuple[int, ...]]:
    """Of all parameters and persistent buffers, tied ones once."""
    model = _on_meta(config)
    tied = model.all_tied_weights_keys.keys()
    return {name: tuple(t.shape) for name, t in model.state_dict().items() if name not in tied}


def _on_meta(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
    return model


def _gguf_name(hf_name: str, architecture: Architecture) -> str:
    module, _, kind = hf_name.rpartition(".")
    if module in _TOP_NAMES:
        return f"{_TOP_NAMES[module]}.{kind}"
    layer, _, rest = hf_name.removeprefix("model.layers.").partition(".")
    if rest in _BARE_NAMES:
        return f"blk.{layer}.{_BARE_NAMES[rest]}"
    return f"blk.{layer}.{architecture.layer_names[rest.removesuffix(f'.{kind}')]}.{kind}"


def _decode(
    tensor: GgufTensor,
    name: str,
    config: PreTrainedConfig,
    architecture: Architecture,
    dtype: torch.dtype,
) -> Tensor:
    if len(tensor.shape) == 1:
        values = torch.from_numpy(dequantize(tensor).copy())
        shift = architecture.norm_shift if name.endswith("norm.weight") else 0.0
        values = values - shift if shift else values
    else:
        values = _decode_by_chunks(tensor, dtype)
    return _in_our_order(values, name, config, architecture).to(dtype).contiguous()


def _in_our_order(
    rows: Tensor, name: str, config: PreTrainedConfig, architecture: Architecture
) -> Tensor:
    """Rows of a tensor, decoded or packed, as transformers has them."""
    if architecture.interleaved and ".self_attn." in name:
        if ".q_proj." in name:
            return _deinterleave(rows, config.num_attention_heads)
        if ".k_proj." in name:
            return _deinterleave(rows, config.num_key_value_heads)
    return rows


def _decode_by_chunks(tensor: GgufTensor, dtype: torch.dtype) -> Tensor:
    """Rows at a time: an embedding of 262,144 rows in fp32 would be 0.7 GB and more."""
    values = torch.empty(tensor.shape, dtype=dtype)
    num_rows = max(1, _CHUNK_WEIGHTS // math.prod(tensor.shape[1:]))
    for start in range(0, tensor.shape[0], num_rows):
        chunk = dequantize(tensor.rows(start, start + num_rows))
        # A BF16 or F32 chunk may still be a read-only view of the file.
        writable = chunk if chunk.flags.writeable else chunk.copy()
        values[start : start + num_rows] = torch.from_numpy(writable)
    return values


def _deinterleave(values: Tensor, num_heads: int) -> Tensor:
    """Undo `LlamaModel.permute` of llama.cpp's converter on [heads * head_dim, ...] rows."""
    half = values.shape[0] // num_heads // 2
    split = values.reshape(num_heads, half, 2, *values.shape[1:])
    return split.swapaxes(1, 2).reshape(values.shape)


_ARCHITECTURES = {
    "gemma3": Architecture(("gemma3_text",), _GEMMA3_NAMES, 1.0, False, gemma3_config),
    "gemma4": Architecture(
        ("gemma4_text", "gemma4_unified_text"), _GEMMA4_NAMES, 0.0, False, make_config=None
    ),
    "llama": Architecture(("llama",), _LLAMA_NAMES, 0.0, True, llama_config),
}
