"""What people do with a LoRA: merge it into the checkpoint, convert, run llama-quantize.

The adapter is added to the bf16 checkpoint in fp32 and rounded to bf16, as a merged checkpoint is
stored; llama.cpp's converter and llama-quantize do the rest. Embeddings get the type that all
other methods have (`export.other_type`), so only the Q4_0 tensors differ.
"""

import shutil
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, PreTrainedModel

from qatlora.base.from_gguf import model_from_gguf
from qatlora.base.source import Source
from qatlora.benchmark.build import Ground
from qatlora.benchmark.plain_peft import PlainPeft
from qatlora.errors import ToolError
from qatlora.grid import Q4Blocks, encode_reference
from qatlora.llamacpp.convert import convert
from qatlora.llamacpp.source import check_converter
from qatlora.llamacpp.tools import find_tool, quantize

_CONVERTED_TYPE = "bf16"


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
    with tempfile.TemporaryDirectory(prefix="qatlora-merged-") as scratch:
        staging = Path(scratch) / "hf"
        _write_merged(adapted, ground.source, staging)
        whole, small = Path(scratch) / "merged.gguf", Path(scratch) / "merged-Q4_0.gguf"
        convert(staging, whole, _CONVERTED_TYPE, {"general.name": ground.source.name})
        quantize(whole, small, ground.other_type)
        config = AutoConfig.from_pretrained(ground.source.folder)
        return model_from_gguf(small, config, torch.bfloat16).to(ground.device)


def _write_merged(adapted: PlainPeft, source: Source, staging: Path) -> None:
    """A copy of the checkpoint with the adapter added; llama.cpp reads any number of shards."""
    staging.mkdir()
    deltas = {f"{name}.weight": delta for name, delta in adapted.deltas().items()}
    shards = set(source.files.values())
    for path in source.folder.iterdir():
        if path in shards:
            tensors = load_file(path)
            for key in tensors:
                if (name := source.model_name(key)) in deltas:
                    tensors[key] = _merged(tensors[key], deltas[name])
            save_file(tensors, staging / path.name, metadata={"format": "pt"})
        elif path.is_file():
            shutil.copy2(path, staging / path.name)


def _merged(weight: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    return (weight.float() + delta.to(weight.device)).bfloat16()
