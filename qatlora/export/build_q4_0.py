"""Build a packed Q4_0 folder from a bf16 checkpoint, tensor by tensor.

The layout is told in `qatlora.base.record`, and why it is so in
docs/decisions/0005-a-packed-tensor-is-the-bytes-of-the-gguf.md.
"""

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from qatlora.base.experts import matrices
from qatlora.base.grids import LayerGrid
from qatlora.base.layout import Layout
from qatlora.base.record import QUANT_METHOD, GridRecord
from qatlora.base.source import Source
from qatlora.base.stores import Q4Store
from qatlora.export.census import Census
from qatlora.export.shards import ShardWriter, kept_in_bf16
from qatlora.grid import GRID_VERSION, decode, pack, recover

OnTensor = Callable[[int], None]


def build_q4_0(
    source: Source,
    layout: Layout,
    folder: Path,
    max_shard_bytes: float,
    device: torch.device,
    on_tensor: OnTensor,
) -> GridRecord:
    """Write weights, config.json and grid.json into `folder`.

    Memory: one shard and one tensor on the host, one tensor and its blocks on `device`.

    Args:
        source: a bf16, fp16 or fp32 checkpoint.
        layout: its Q4_0 list.
        folder: an empty folder.
        max_shard_bytes: size of a safetensors file at most, unless one tensor is larger.
        device: where the grid is recovered or searched.
        on_tensor: called with 1 after each tensor of the source.
    """
    census, shards = Census(), ShardWriter(folder, max_shard_bytes)
    for key in source.files:
        tensor = source.tensor(key)
        census.read(key, tensor)
        name = key.removesuffix(".weight")
        if name in layout.grid:
            shards.add(key, _packed(name, tensor.to(device), census))
        else:
            shards.add_all(kept_in_bf16(layout, key, tensor))
        on_tensor(1)
    shards.close()
    record = census.record(source, layout, "q4_0")
    record.write(folder)
    marker = {"quant_method": QUANT_METHOD, "grid_version": GRID_VERSION}
    config = source.config | {"quantization_config": marker}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    return record


def _packed(name: str, weight: Tensor, census: Census) -> Tensor:
    recovered = recover(weight)
    stores = tuple(Q4Store(matrix) for matrix in matrices(recovered.blocks))
    grid = LayerGrid(stores, int(recovered.on_grid.sum()))
    census.built(name, grid, weight, decode(recovered.blocks, weight.dtype))
    return pack(recovered.blocks).cpu()
