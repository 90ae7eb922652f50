"""Which store a layer gets, and where its steps come from: the best weights at hand.

bf16 checkpoint     recovered or searched from its weights
packed Q4_0 build   stored, with the levels
NF4 build of ours   stored beside the NF4 weights: those of its source
public NF4 build    searched from the dequantized NF4, with a warning
"""

import hashlib
import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from qatlora.base.experts import matrices
from qatlora.base.names import is_stack, weight_key
from qatlora.base.nf4 import dequantized_nf4, quantized_nf4
from qatlora.base.packed import packed_blocks
from qatlora.base.source import Source
from qatlora.base.stores import Bf16Store, Nf4Store, Q4Store, Store
from qatlora.base.streamed import stored_nf4
from qatlora.grid import decode, recover

# A checkpoint counts as on a grid when nearly all blocks of a tensor are: a single odd block (an
# edited row, say) should not send the whole tensor to the latent path.
ON_GRID_SHARE = 0.99


class LayerGrid(NamedTuple):
    """What is known of one weight.

    stores: of each of its matrices: one of a linear, one per expert of a stack.
    num_on_grid: how many of its blocks lie on a grid in the checkpoint.
    """

    stores: tuple[Store, ...]
    num_on_grid: int

    @property
    def num_blocks(self) -> int:
        """Blocks of all matrices."""
        return sum(store.steps.numel() for store in self.stores)

    @property
    def steps(self) -> Tensor:
        """Steps of the weight, float16 [..., in / 32]."""
        steps = [store.steps for store in self.stores]
        return steps[0] if len(steps) == 1 else torch.stack(steps)

    def digest(self) -> str:
        """`Store.digest`; of several, hex SHA-256 over theirs."""
        digests = [store.digest() for store in self.stores]
        return digests[0] if len(digests) == 1 else _digest_of(digests)


def layer_grid(source: Source, name: str, kind: str, device: torch.device) -> LayerGrid:
    """Read one weight, find its steps and latent levels, and keep them as `kind`.

    In memory are the weight as stored, its blocks, and what is kept of them.

    Args:
        source: the checkpoint.
        name: the weight's name in the lists.
        kind: nf4, q4_0 or bf16.
        device: where the stores go.

    Raises:
        CheckpointError: a tensor is missing or damaged.
    """
    if name in source.packed_modules:
        return _stored_blocks(source, name, kind, device)
    if name in source.nf4_modules:
        weight = stored_nf4(source, name, device)
    else:
        weight = source.tensor(weight_key(name)).to(device)
    if _has_stored_steps(source, name):
        steps, num_on_grid, on_grid = _stored_steps(source, name, device)
    else:
        blocks, on_grid_blocks = recover(_values(source, name, weight))
        steps, num_on_grid = blocks.steps, int(on_grid_blocks.sum())
        if kind == "q4_0":
            return LayerGrid(tuple(map(Q4Store, matrices(blocks))), num_on_grid)
        del blocks
        on_grid = num_on_grid >= ON_GRID_SHARE * steps.numel()
    return LayerGrid(_stores(weight, steps, kind, on_grid=on_grid), num_on_grid)


def _stores(weight: Tensor, steps: Tensor, kind: str, *, on_grid: bool) -> tuple[Store, ...]:
    """A weight as it was read, and its steps; of a stack matrix by matrix."""
    if hasattr(weight, "quant_state"):
        return (Nf4Store(weight, steps, on_grid=on_grid),)
    pairs = [(weight, steps)] if weight.ndim == 2 else zip(weight, steps, strict=True)
    if kind == "nf4":
        return tuple(
            Nf4Store(quantized_nf4(one.bfloat16()), its, on_grid=on_grid) for one, its in pairs
        )
    return tuple(Bf16Store(one.bfloat16(), its, on_grid=on_grid) for one, its in pairs)


def base_digest(stores: Mapping[str, str]) -> str:
    """Hex SHA-256 of a base: name -> `LayerGrid.digest`, in the order of the Q4_0 list."""
    return _digest_of(f"{name} {of_stores}\n" for name, of_stores in stores.items())


def _digest_of(parts: Iterable[str]) -> str:
    return hashlib.sha256("".join(parts).encode()).hexdigest()


def _stored_blocks(source: Source, name: str, kind: str, device: torch.device) -> LayerGrid:
    """What is packed is on its grid, even where its source was not."""
    assert source.record is not None
    blocks = packed_blocks(source, name, device)
    stores = tuple(
        Q4Store(matrix)
        if kind == "q4_0"
        else Bf16Store(decode(matrix, torch.bfloat16), matrix.steps, on_grid=True)
        for matrix in matrices(blocks)
    )
    return LayerGrid(stores, source.record.on_grid_blocks[name])


def _has_stored_steps(source: Source, name: str) -> bool:
    """Of what a build of ours has in NF4, and of its experts, which lie in bf16 there."""
    if source.record is None or source.record.storage != "nf4":
        return False
    return name in source.nf4_modules or (is_stack(name) and name in source.record.blocks)


def _stored_steps(source: Source, name: str, device: torch.device) -> tuple[Tensor, int, bool]:
    """Steps, number of blocks on a grid, and whether those are nearly all, by a build's record."""
    assert source.record is not None
    num_on_grid = source.record.on_grid_blocks[name]
    on_grid = num_on_grid >= ON_GRID_SHARE * source.record.blocks[name]
    return source.steps(name).to(device), num_on_grid, on_grid


def _values(source: Source, name: str, weight: Tensor) -> Tensor:
    """The checkpoint's own values, or the dequantized NF4 where there are no others."""
    if name not in source.nf4_modules:
        return weight
    warnings.warn(
        f"{source.name} is an NF4 build whose bf16 source is not at hand, so its steps are "
        "searched from the NF4 values: only about a quarter of an on-grid checkpoint's weights "
        "come back. Give base.path of the bf16 checkpoint to keep its grid.",
        stacklevel=2,
    )
    return dequantized_nf4(weight)
