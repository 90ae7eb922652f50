"""Tiny GGUF files written by hand, so that unpacking is tested without llama.cpp."""

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray
from sentencepiece import sentencepiece_model_pb2

HIDDEN, FEED_FORWARD, HEADS, KV_HEADS, HEAD_DIM = 64, 96, 4, 2, 16
ROPE_THETA = 20_000.0


def add_sentencepiece(writer: gguf.GGUFWriter, model: Path) -> int:
    """The vocabulary of a tokenizer.model as llama.cpp's converter would write it."""
    proto = sentencepiece_model_pb2.ModelProto()
    proto.ParseFromString(model.read_bytes())
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece.piece for piece in proto.pieces])
    writer.add_token_scores(
        [-1000.0 if piece.type in (3, 4) else piece.score for piece in proto.pieces]
    )
    writer.add_token_types([piece.type for piece in proto.pieces])
    writer.add_bos_token_id(proto.trainer_spec.bos_id)
    writer.add_eos_token_id(proto.trainer_spec.eos_id)
    writer.add_unk_token_id(proto.trainer_spec.unk_id)
    writer.add_pad_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)
    return len(proto.pieces)


def write_model(
    path: Path,
    architecture: str,
    tokenizer_model: Path,
    num_layers: int = 2,
    metadata: dict[str, Any] | None = None,
    tensors: dict[str, NDArray[np.float32] | None] | None = None,
) -> dict[str, NDArray[np.float32]]:
    """Write a random F32 model; returns its tensors by GGUF name.

    metadata and tensors are added to, or replace, what a small model of the architecture has; None
    leaves a tensor out.
    """
    writer = gguf.GGUFWriter(path, architecture)
    num_tokens = add_sentencepiece(writer, tokenizer_model)
    writer.add_block_count(num_layers)
    writer.add_context_length(256)
    writer.add_embedding_length(HIDDEN)
    writer.add_feed_forward_length(FEED_FORWARD)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_key_length(HEAD_DIM)
    writer.add_value_length(HEAD_DIM)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_rope_freq_base(ROPE_THETA)
    if architecture == "gemma3":
        writer.add_sliding_window(32)
    for key, value in (metadata or {}).items():
        kind = gguf.GGUFValueType.FLOAT32 if isinstance(value, float) else None
        if kind is None:
            writer.add_string(key, value)
        else:
            writer.add_key_value(key, value, kind)
    written = _weights(architecture, num_tokens, num_layers) | (tensors or {})
    for name, weight in written.items():
        if weight is not None:
            writer.add_tensor(name, weight)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return {name: weight for name, weight in written.items() if weight is not None}


def _weights(architecture: str, num_tokens: int, num_layers: int) -> dict[str, NDArray[np.float32]]:
    queries, keys = HEADS * HEAD_DIM, KV_HEADS * HEAD_DIM
    layer = {
        "attn_norm": (HIDDEN,),
        "attn_q": (queries, HIDDEN),
        "attn_k": (keys, HIDDEN),
        "attn_v": (keys, HIDDEN),
        "attn_output": (HIDDEN, queries),
        "ffn_norm": (HIDDEN,),
        "ffn_gate": (FEED_FORWARD, HIDDEN),
        "ffn_up": (FEED_FORWARD, HIDDEN),
        "ffn_down": (HIDDEN, FEED_FORWARD),
    }
    if architecture == "gemma3":
        norms = ("post_attention_norm", "post_ffw_norm")
        layer |= dict.fromkeys(norms, (HIDDEN,))
        layer |= dict.fromkeys(("attn_q_norm", "attn_k_norm"), (HEAD_DIM,))
    shapes = {"token_embd.weight": (num_tokens, HIDDEN), "output_norm.weight": (HIDDEN,)}
    for index in range(num_layers):
        shapes |= {f"blk.{index}.{name}.weight": shape for name, shape in layer.items()}
    if architecture == "llama":
        shapes["output.weight"] = (num_tokens, HIDDEN)
    rng = np.random.default_rng(7)
    # Multiples of 2^-7 below 1: exact in bf16, also after Gemma's shift of the norms by 1.
    return {
        name: (rng.integers(-64, 64, shape) / 128 + ("norm" in name)).astype(np.float32)
        for name, shape in shapes.items()
    }
