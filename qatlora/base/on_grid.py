"""Bring a checkpoint onto the Q4_0 grid by rounding, as a checkpoint folder of its own.

It stands in for a QAT checkpoint where none is at hand: its trained tensors are step * level in
bf16, all others are copied as they are.
"""

import hashlib
import json
import shutil
from collections import defaultdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from qatlora import files
from qatlora.base.layout import Layout
from qatlora.base.names import weight_key
from qatlora.base.source import Source
from qatlora.grid import (
    Q4Blocks,
    decode,
    detect,
    encode_reference,
    latents,
    nearest_levels,
    search_steps,
)


def on_grid_share(source: Source, layout: Layout, device: torch.device) -> float:
    """Share of the trained blocks that lie on a grid in the checkpoint."""
    found = total = 0
    for name in layout.trained:
        on_grid = detect(source.tensor(weight_key(name)).to(device))
        found, total = found + int(on_grid.sum()), total + on_grid.numel()
    return found / total


def rounded_folder(
    source: Source, layout: Layout, by: str, device: torch.device, parent: Path
) -> Path:
    """Write the rounded checkpoint below `parent`, or find it there from an earlier run.

    Args:
        source: an ordinary checkpoint.
        layout: its Q4_0 tensors.
        by: search (steps of least squared error) or reference (llama.cpp's rule).
        device: where to round.
        parent: folder of the run.
    """
    stats = sorted(
        (p.name, p.stat().st_size, p.stat().st_mtime_ns) for p in source.folder.iterdir()
    )
    identity = json.dumps([str(source.folder), stats, by, list(layout.grid)])
    target = parent / f"base-{hashlib.sha256(identity.encode()).hexdigest()[:12]}"
    if target.is_dir():
        return target
    by_file: dict[Path, set[str]] = defaultdict(set)
    for name in map(weight_key, layout.grid):
        by_file[source.files[name]].add(source.stored_names.get(name, name))
    with files.replacing_folder(target) as folder:
        for path in source.folder.iterdir():
            if path.is_file() and path not in by_file:
                shutil.copy2(path, folder / path.name)
        for path, names in by_file.items():
            tensors = load_file(path)
            for name in names:
                blocks = _rounded(tensors[name].to(device), by)
                tensors[name] = decode(blocks, torch.bfloat16).cpu()
            save_file(tensors, folder / path.name, metadata={"format": "pt"})
    return target


def _rounded(weight: torch.Tensor, by: str) -> Q4Blocks:
    if by == "reference":
        return encode_reference(weight)
    steps = search_steps(weight)
    return Q4Blocks(steps, nearest_levels(latents(weight, steps)))
