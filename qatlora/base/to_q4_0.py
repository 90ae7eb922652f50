"""Two ways to Q4_0 for a finished checkpoint."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from qatlora.base.names import weight_key
from qatlora.base.packed import packed_blocks
from qatlora.base.source import Source
from qatlora.grid import Q4Blocks, decode, encode_reference, recover

NamedBlocks = Iterator[tuple[str, Q4Blocks]]


def by_llama_cpp(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as llama-quantize makes them."""
    for name in names:
        yield name, encode_reference(_weight(source, name, device))


def by_grid(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as qatlora makes them: recovered where a block lies on a grid, else searched."""
    for name in names:
        yield name, recover(_weight(source, name, device)).blocks


def _weight(source: Source, name: str, device: torch.device) -> Tensor:
    """The weight as it is stored; a packed one decoded to float32, which holds it exactly."""
    if name in source.packed_modules:
        return decode(packed_blocks(source, name, device), torch.float32)
    return source.tensor(weight_key(name)).to(device)
