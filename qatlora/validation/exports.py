"""Two ways to Q4_0 for a finished checkpoint, and what other types would do to its tensors."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from qatlora.base.others import deployed_embedding
from qatlora.base.source import Source
from qatlora.grid import BLOCK_SIZE, Q4Blocks, decode, encode_reference, recover

NamedBlocks = Iterator[tuple[str, Q4Blocks]]


def by_llama_cpp(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as llama-quantize makes them."""
    for name in names:
        yield name, encode_reference(source.tensor(f"{name}.weight").to(device))


def by_grid(source: Source, names: Iterable[str], device: torch.device) -> NamedBlocks:
    """Blocks as qatlora makes them: recovered where a block lies on a grid, else searched."""
    for name in names:
        yield name, recover(source.tensor(f"{name}.weight").to(device)).blocks


@torch.no_grad()
def put_blocks(model: nn.Module, blocks: Iterable[tuple[str, Q4Blocks]]) -> None:
    """Let the linears of a plain model be these blocks."""
    for name, value in blocks:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        weight.copy_(decode(value, torch.float32))


def same_blocks(model: nn.Module, source: Source, names: Iterable[str]) -> float:
    """Share of blocks of the named weights that a bf16 model holds as the checkpoint does."""
    same = total = 0
    for name in names:
        stored = source.tensor(f"{name}.weight").to(torch.bfloat16)
        equal = model.get_submodule(name).weight.cpu() == stored
        blocks = equal.unflatten(-1, (-1, BLOCK_SIZE)).all(-1)
        same, total = same + int(blocks.sum()), total + blocks.numel()
    return same / total


def q8_0_error(source: Source, names: Iterable[str]) -> float:
    """Relative error of Q8_0 over all named weights: sqrt(sum (decoded - w)^2 / sum w^2)."""
    errors = weights = 0.0
    for name in names:
        weight = source.tensor(f"{name}.weight").float()
        decoded = deployed_embedding(weight, "q8_0")
        errors += torch.linalg.vector_norm(decoded - weight).item() ** 2
        weights += torch.linalg.vector_norm(weight).item() ** 2
    return float((errors / weights) ** 0.5) if weights else 0.0
