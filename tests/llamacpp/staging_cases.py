"""Staging folders as export makes them, of the tiny checkpoints."""

import json
import shutil
from pathlib import Path

import gguf
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


def reference_q4_0(weight: Tensor) -> Tensor:
    """Packed rows uint8 [..., in / 32 * 18] by gguf's own encoder."""
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.quantize(weight.float().numpy(), kind))


def decoded(packed: Tensor) -> Tensor:
    kind = gguf.GGMLQuantizationType.Q4_0
    return torch.from_numpy(gguf.quants.dequantize(packed.numpy(), kind))


def make_staging(source: Path, staging: Path, deploy: bool = True) -> dict[str, Tensor]:
    """Copy an HF folder, its decoder linears as Q4_0 blocks; returns these blocks."""
    staging.mkdir(parents=True)
    for path in source.iterdir():
        if path.suffix != ".safetensors":
            shutil.copy(path, staging)
    weights = load_file(source / "model.safetensors")
    linears = {name for name in weights if name.endswith("_proj.weight") and deploy}
    packed = {name: reference_q4_0(weights.pop(name)) for name in sorted(linears)}
    if packed:
        save_file(packed, staging / "deployed.safetensors")
    save_file(weights, staging / "model.safetensors")
    return packed


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
