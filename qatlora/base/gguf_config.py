"""transformers configurations from the metadata of GGUF files.

Every key that changes the arithmetic is read; what a GGUF does not say (the pattern of sliding
layers, the rotary base of local layers) is what llama.cpp itself assumes for the architecture.
"""

from typing import Any

import numpy as np
from transformers import Gemma3TextConfig, LlamaConfig, PreTrainedConfig

from qatlora.errors import CheckpointError
from qatlora.llamacpp.gguf_read import GgufFile, GgufTensor, dequantize

_GEMMA3_27B_LAYERS = 62
_GEMMA3_LOCAL_THETA = 10_000.0
_GEMMA3_PATTERN = 6  # five sliding layers, then a full one
_LLAMA3_CONTEXT = 8192


def _float(value: float) -> float:
    """The shortest decimal that gives the same float32: 1e-06, not 9.999999974752427e-07."""
    return float(str(np.float32(value)))


def _common_settings(gguf: GgufFile, prefix: str) -> dict[str, Any]:
    num_heads = gguf.require(f"{prefix}.attention.head_count")
    hidden_size = gguf.require(f"{prefix}.embedding_length")
    eos = gguf.metadata.get("tokenizer.ggml.eos_token_id")
    return {
        "vocab_size": _embedding(gguf).shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": gguf.require(f"{prefix}.feed_forward_length"),
        "num_hidden_layers": gguf.require(f"{prefix}.block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": gguf.metadata.get(f"{prefix}.attention.head_count_kv", num_heads),
        "max_position_embeddings": gguf.require(f"{prefix}.context_length"),
        "rms_norm_eps": _float(gguf.require(f"{prefix}.attention.layer_norm_rms_epsilon")),
        "tie_word_embeddings": "output.weight" not in gguf.tensors,
        "bos_token_id": gguf.metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": eos,
        "pad_token_id": gguf.metadata.get("tokenizer.ggml.padding_token_id", eos),
    }


def _embedding(gguf: GgufFile) -> GgufTensor:
    if "token_embd.weight" not in gguf.tensors:
        raise CheckpointError(
            f"{gguf.path} has no tensor token_embd.weight: it is a vocabulary, an adapter or a "
            "projector, not a model; give the file of the language model."
        )
    return gguf.tensors["token_embd.weight"]


def _linear_rope_scaling(gguf: GgufFile, prefix: str) -> dict[str, Any]:
    kind = gguf.metadata.get(f"{prefix}.rope.scaling.type", "none")
    if kind == "none":
        return {"rope_type": "default"}
    if kind == "linear":
        return {
            "rope_type": "linear",
            "factor": _float(gguf.require(f"{prefix}.rope.scaling.factor")),
        }
    raise CheckpointError(
        f"{gguf.path} scales its rotary embedding by the rule {kind!r}; of GGUF files only none "
        "and linear can be loaded: give the HF folder of the model instead."
    )


def gemma3_config(gguf: GgufFile) -> PreTrainedConfig:
    """Configuration of a Gemma 3 text model (`general.architecture` gemma3)."""
    common = _common_settings(gguf, "gemma3")
    num_layers = common["num_hidden_layers"]
    head_dim = gguf.metadata.get("gemma3.attention.key_length", 256)
    # The one size whose attention is scaled by something else than its head_dim (llama.cpp makes
    # the same distinction, in src/models/gemma3.cpp).
    scalar = head_dim
    if num_layers == _GEMMA3_27B_LAYERS:
        scalar = common["hidden_size"] // common["num_attention_heads"]
    window = gguf.metadata.get("gemma3.attention.sliding_window")
    pattern = _GEMMA3_PATTERN if window else 1
    local_theta = gguf.metadata.get("gemma3.rope.freq_base_swa", _GEMMA3_LOCAL_THETA)
    full_theta = gguf.metadata.get("gemma3.rope.freq_base", 1_000_000.0)
    return Gemma3TextConfig(
        **common,
        head_dim=head_dim,
        query_pre_attn_scalar=scalar,
        sliding_window=window,
        layer_types=[
            "full_attention" if (i + 1) % pattern == 0 else "sliding_attention"
            for i in range(num_layers)
        ],
        final_logit_softcapping=gguf.metadata.get("gemma3.final_logit_softcapping"),
        rope_parameters={
            "full_attention": {"rope_theta": _float(full_theta)}
            | _linear_rope_scaling(gguf, "gemma3"),
            "sliding_attention": {"rope_theta": _float(local_theta), "rope_type": "default"},
        },
        architectures=["Gemma3ForCausalLM"],
    )


def llama_config(gguf: GgufFile) -> PreTrainedConfig:
    """Configuration of a Llama-shaped model (`general.architecture` llama)."""
    common = _common_settings(gguf, "llama")
    head_dim = common["hidden_size"] // common["num_attention_heads"]
    head_dim = gguf.metadata.get("llama.attention.key_length", head_dim)
    theta = _float(gguf.metadata.get("llama.rope.freq_base", 10_000.0))
    return LlamaConfig(
        **common,
        head_dim=head_dim,
        attention_bias="blk.0.attn_q.bias" in gguf.tensors,
        rope_parameters={"rope_theta": theta} | _llama_rope_scaling(gguf, theta, head_dim),
        architectures=["LlamaForCausalLM"],
    )


def _llama_rope_scaling(gguf: GgufFile, theta: float, head_dim: int) -> dict[str, Any]:
    """Llama 3.1 and later: the GGUF holds the resulting factors, the config their parameters."""
    if "rope_freqs.weight" not in gguf.tensors:
        return _linear_rope_scaling(gguf, "llama")
    factors = dequantize(gguf.tensors["rope_freqs.weight"])
    factor = _float(factors.max())
    scaling = {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": _LLAMA3_CONTEXT,
    }
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = (_LLAMA3_CONTEXT / wavelengths - 1.0) / (4.0 - 1.0)
    blended = 1 / ((1 - smooth) / factor + smooth)
    expected = np.where(smooth < 0, factor, np.where(smooth > 1, 1.0, blended))
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise CheckpointError(
            f"{gguf.path} has rope_freqs.weight that are not those of Llama 3.1 to 3.3: their "
            "rule cannot be told from the file; give the HF folder of the model instead."
        )
    return scaling
