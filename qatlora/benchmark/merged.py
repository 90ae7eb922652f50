"""What people do with a LoRA: merge it into the checkpoint, convert, run llama-quantize.

The adapter is added to the bf16 checkpoint in fp32 and rounded to bf16, as a merged checkpoint is
stored; llama.cpp's converter and llama-quantize do the rest. Embeddings get the type that all
other methods have (`export.other_type`), so only the Q4_0 tensors differ.
"""

import tempfile
from pathlib import Path

import torch
from transformers import AutoConfig, PreTrainedModel

from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.source import Source
from qatlora.benchmark.build import Ground
from qatlora.benchmark.plain_peft import PlainPeft
from qatlora.errors import ToolError
from qatlora.export.plain_gguf import write_plain_gguf
from qatlora.grid import Q4Blocks, encode_reference
from qatlora.llamacpp.source import check_converter
from qatlora.llamacpp.tools import find_tool, quantize


def why_not_mergeable() -> str | None:
    """None if llama.cpp's converter and llama-quantize are at hand, else what is missing."""
    if find_tool("llama-quantize") is None:
        return (
            "llama-quantize is not there, so nothing was merged and quantized; build it with "
            "`python -m qatlora.llamacpp.tools install`"
        )
    try:
        check_converter()
    except ToolError as problem:
        return str(problem)
    return None


def merged_blocks(adapted: PlainPeft, source: Source) -> dict[str, Q4Blocks]:
    """Module name -> blocks of the merged bf16 weight by llama.cpp's rule."""
    return {
        name: encode_reference(_merged(source.tensor(f"{name}.weight"), delta))
        for name, delta in adapted.deltas().items()
    }


def quantized_model(adapted: PlainPeft, ground: Ground) -> PreTrainedModel:
    """The merged model as llama-quantize made it, read back from its GGUF.

    Raises:
        ToolError, ExportError: llama.cpp failed.
    """
    deltas = {f"{name}.weight": delta for name, delta in adapted.deltas().items()}

    def change(name: str, weight: torch.Tensor) -> torch.Tensor:
        return _merged(weight, deltas[name]) if name in deltas else weight

    with tempfile.TemporaryDirectory(prefix="qatlora-merged-") as scratch:
        whole, small = Path(scratch) / "merged.gguf", Path(scratch) / "merged-Q4_0.gguf"
        write_plain_gguf(ground.source, ground.layout.tied, whole, change)
        quantize(whole, small, ground.other_type)
        config = AutoConfig.from_pretrained(ground.source.folder)
        return model_from_gguf(small, config, ground.compute_dtype).to(ground.device)


def _merged(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (weight.float() + delta.to(weight.device)).bfloat16()
