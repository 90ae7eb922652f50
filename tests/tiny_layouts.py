"""Configurations of the tiny multimodal checkpoints: the layouts that Gemma is published in.

Widths are multiples of 32. Each has layers that slide and one that is full, and the towers that its
model has; their weights are never looked at. Vocabulary sizes are those of the tokenizer.
"""

from typing import Any

from transformers import Gemma3Config, Gemma4Config, Gemma4UnifiedConfig, PreTrainedConfig

SPREAD = 0.1
"""Standard deviation of the random weights: wide enough that the logits differ visibly."""

_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "sliding_window": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "max_position_embeddings": 512,
    "initializer_range": SPREAD,
}
_GEMMA4_TEXT = _TEXT | {"global_head_dim": 64, "final_logit_softcapping": 30.0}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_GEMMA4_VISION = _VISION | {"num_key_value_heads": 2, "head_dim": 16, "position_embedding_size": 64}


def _gemma3(vocab_size: int) -> PreTrainedConfig:
    """Six layers: a GGUF of Gemma 3 cannot say which layers slide, and llama.cpp assumes 5 of 6."""
    text = _TEXT | {
        "vocab_size": vocab_size,
        "num_hidden_layers": 6,
        "layer_types": ["sliding_attention"] * 5 + ["full_attention"],
        "query_pre_attn_scalar": 32,
    }
    vision = _VISION | {"image_size": 56, "patch_size": 14, "vision_use_head": False}
    return Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4)


def _gemma4_dense(vocab_size: int, experts: dict[str, Any] | None = None) -> PreTrainedConfig:
    """As 31B: no v_proj in full layers, no audio."""
    text = _GEMMA4_TEXT | {
        "vocab_size": vocab_size,
        "hidden_size_per_layer_input": 0,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "use_bidirectional_attention": "vision",
    }
    return Gemma4Config(text_config=text | (experts or {}), vision_config=_GEMMA4_VISION)


def _gemma4_experts(vocab_size: int) -> PreTrainedConfig:
    """As 26B-A4B: in each layer experts beside the MLP, two of five for each token."""
    experts = {
        "enable_moe_block": True,
        "num_experts": 5,
        "top_k_experts": 2,
        "moe_intermediate_size": 96,
    }
    return _gemma4_dense(vocab_size, experts)


def _gemma4_per_layer(vocab_size: int) -> PreTrainedConfig:
    """As E2B: per-layer embeddings, two layers that share keys and values and have a wide MLP."""
    text = _GEMMA4_TEXT | {
        "vocab_size": vocab_size,
        "num_hidden_layers": 4,
        "layer_types": _TEXT["layer_types"] * 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": vocab_size,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
    }
    audio = {"num_hidden_layers": 1, "hidden_size": 32, "num_attention_heads": 2}
    audio |= {"output_proj_dims": 32, "subsampling_conv_channels": [8, 8]}
    return Gemma4Config(text_config=text, vision_config=_GEMMA4_VISION, audio_config=audio)


def _gemma4_unified(vocab_size: int) -> PreTrainedConfig:
    """As 12B: no towers; its config.json has keys that the model does not read."""
    text = _GEMMA4_TEXT | {
        "vocab_size": vocab_size,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": False,
        "moe_intermediate_size": None,
    }
    vision = {"patch_size": 4, "mm_embed_dim": 64, "mm_posemb_size": 16, "output_proj_dims": 64}
    return Gemma4UnifiedConfig(
        text_config=text, vision_config=vision, audio_config={"audio_embed_dim": 32}
    )


MULTIMODAL = {
    "gemma3_multimodal": _gemma3,
    "gemma4_dense": _gemma4_dense,
    "gemma4_experts": _gemma4_experts,
    "gemma4_per_layer": _gemma4_per_layer,
    "gemma4_unified": _gemma4_unified,
}
