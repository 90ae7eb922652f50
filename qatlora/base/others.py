"""Embeddings and lm_head as the GGUF will store them, already while training.

They are not trained, but they are part of the deployed model: with `export.other_type=q8_0` the
student learns over the very embeddings that llama.cpp will use, and the file read back equals the
trained model exactly. The encoder is gguf-py's, the one that the converter uses.
"""

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedModel

_ROWS = 4096


@torch.no_grad()
def deploy_embeddings(model: PreTrainedModel, other_type: str) -> None:
    """Round input embeddings and lm_head in place to `other_type` (q8_0, f16, bf16 or f32)."""
    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    weights = {id(layer.weight): layer.weight for layer in layers if layer is not None}
    for weight in weights.values():  # a tied pair is one tensor
        for rows in weight.split(_ROWS):
            rows.copy_(deployed_embedding(rows, other_type))


def deployed_embedding(weight: Tensor, other_type: str) -> Tensor:
    """What [rows, width] becomes when it is written as `other_type` and read back; float32."""
    kind = gguf.GGMLQuantizationType[other_type.upper()]
    encoded = gguf.quants.quantize(weight.float().cpu().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(encoded, kind)).to(weight.device)
