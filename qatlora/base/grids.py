"""Which store a layer gets, and where its steps come from: the best weights at hand.

bf16 checkpoint     recovered or searched from its weights
packed Q4_0 build   stored, with the levels
NF4 build of ours   stored beside the NF4 weights: those of its source
public NF4 build    searched from the dequantized NF4, with a warning
"""

import hashlib
import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from qatlora.base.packed import packed_blocks
from qatlora.base.source import Source
from qatlora.base.stores import Bf16Store, Nf4Store, Q4Store, Store, dequantized_nf4
from qatlora.grid import decode, recover

# A checkpoint counts as on a grid when nearly all blocks of a tensor are: a single odd block (an
# edited row, say) should not send the whole tensor to the latent path.
ON_GRID_SHARE = 0.99


class LayerGrid(NamedTuple):
    """The store of one layer, and how many of its blocks lie on a grid in the checkpoint."""

    store: Store
    num_on_grid: int


def layer_grid(
    source: Source, name: str, linear: nn.Module, kind: str, device: torch.device
) -> LayerGrid:
    """Find steps and latent levels of one linear and keep them as `kind`.

    Args:
        source: the checkpoint.
        name: the module's name.
        linear: the loaded module; its weight is not looked at where the source is packed.
        kind: nf4, q4_0 or bf16.
        device: where the store goes.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    if name in source.packed_modules:
        return _stored_blocks(source, name, kind, device)
    if name in source.nf4_modules and source.record is not None:
        return _stored_steps(source, name, linear, device)
    recovered = recover(_best_weight(source, name, linear).to(device))
    blocks, num_on_grid = recovered.blocks, int(recovered.on_grid.sum())
    if kind == "q4_0":
        return LayerGrid(Q4Store(blocks), num_on_grid)
    on_grid = num_on_grid >= ON_GRID_SHARE * blocks.steps.numel()
    # A module that is Q4_0 in the GGUF but not in the NF4 list stays bf16 in memory.
    if hasattr(linear.weight, "quant_state"):
        return LayerGrid(Nf4Store(linear.weight, blocks.steps, on_grid=on_grid), num_on_grid)
    weight = linear.weight.detach()
    return LayerGrid(Bf16Store(weight, blocks.steps, on_grid=on_grid), num_on_grid)


def base_digest(stores: Mapping[str, str]) -> str:
    """Hex SHA-256 of a base: module -> `Store.digest`, in the order of the Q4_0 list."""
    digest = hashlib.sha256()
    for name, of_store in stores.items():
        digest.update(f"{name} {of_store}\n".encode())
    return digest.hexdigest()


def _stored_blocks(source: Source, name: str, kind: str, device: torch.device) -> LayerGrid:
    """What is packed is on its grid, even where its source was not."""
    assert source.record is not None
    blocks = packed_blocks(source, name, device)
    store = (
        Q4Store(blocks)
        if kind == "q4_0"
        else Bf16Store(decode(blocks, torch.bfloat16), blocks.steps, on_grid=True)
    )
    return LayerGrid(store, source.record.on_grid_blocks[name])


def _stored_steps(source: Source, name: str, linear: nn.Module, device: torch.device) -> LayerGrid:
    assert source.record is not None
    num_on_grid = source.record.on_grid_blocks[name]
    on_grid = num_on_grid >= ON_GRID_SHARE * source.record.blocks[name]
    steps = source.steps(name).to(device)
    return LayerGrid(Nf4Store(linear.weight, steps, on_grid=on_grid), num_on_grid)


def _best_weight(source: Source, name: str, linear: nn.Module) -> Tensor:
    """The bf16 source weight, or the dequantized NF4 where there is no source."""
    if name not in source.nf4_modules:
        return source.tensor(f"{name}.weight")
    warnings.warn(
        f"{source.name} is an NF4 build whose bf16 source is not at hand, so its steps are "
        "searched from the NF4 values: only about a quarter of an on-grid checkpoint's weights "
        "come back. Give base.path of the bf16 checkpoint to keep its grid.",
        stacklevel=2,
    )
    return dequantized_nf4(linear.weight)
