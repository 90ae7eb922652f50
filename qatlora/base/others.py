"""Embeddings and other matrices as the GGUF will store them, already while training.

They are not trained, but they are part of the deployed model: with `export.other_type=q8_0` the
student learns over the very embeddings that llama.cpp will use, and the file read back equals the
trained model exactly. The encoder is gguf-py's, the one that the converter uses.
"""

from collections.abc import Collection

import gguf
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from qatlora.base.names import is_stack
from qatlora.grid import BLOCK_SIZE

_ROWS = 4096
_ROUTER = ".router.proj"


def others_to(model: nn.Module, dtype: torch.dtype) -> None:
    """Let all parameters of a base be `dtype`, in place; codes and steps, which are none, stay.

    The forward takes its arithmetic from the embeddings wherever autocast is off. Before
    `deploy_others`: a float32 base then has the embeddings' exact values, as a file read back has.
    """
    for parameter in model.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)


@torch.no_grad()
def deploy_others(model: PreTrainedModel, grid: Collection[str], other_type: str) -> None:
    """Round every matrix of the text decoder outside of `grid`, and lm_head, in place.

    These are the embeddings, and in Gemma 4 E2B and E4B the embedding and the projection of the
    per-layer inputs. Norms and routers keep their precision (F32 in the file), and towers are not
    in it.

    Args:
        model: any model of the base's layout.
        grid: names of the weights that are Q4_0 in the GGUF.
        other_type: q8_0, f16, bf16 or f32.
    """
    kept = {model.get_submodule(name) for name in grid if not is_stack(name)}
    kept |= {module for name, module in model.named_modules() if name.endswith(_ROUTER)}
    layers = {*model.get_decoder().modules(), model.get_output_embeddings()} - kept
    plain = (layer.weight for layer in layers if isinstance(layer, nn.Embedding | nn.Linear))
    for weight in {id(weight): weight for weight in plain}.values():  # a tied pair is one tensor
        for rows in weight.split(_ROWS):
            rows.copy_(deployed_other(rows, other_type))


def deployed_other(weight: Tensor, other_type: str) -> Tensor:
    """What [rows, width] becomes when it is written as `other_type` and read back; float32."""
    if other_type == "q8_0" and weight.shape[-1] % BLOCK_SIZE:
        other_type = "f16"  # as the converter does
    kind = gguf.GGMLQuantizationType[other_type.upper()]
    encoded = gguf.quants.quantize(weight.float().cpu().numpy(), kind)
    return torch.from_numpy(gguf.quants.dequantize(encoded, kind)).to(weight.device)
