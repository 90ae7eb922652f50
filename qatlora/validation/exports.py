"""Two ways to Q4_0 for a finished checkpoint."""

from collections.abc import Iterable, Iterator

import torch

from qatlora.base.names import weight_key
from qatlora.base.source import Source
from qatlora.grid import Q4Blocks, encode_reference, recover

NamedBlocks = Iterator[tuple[str, Q4Blocks]]


def by_llama_cpp(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as llama-quantize makes them."""
    for name in names:
        yield name, encode_reference(source.tensor(weight_key(name)).to(device))


def by_grid(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as qatlora makes them: recovered where a block lies on a grid, else searched."""
    for name in names:
        yield name, recover(source.tensor(weight_key(name)).to(device)).blocks
