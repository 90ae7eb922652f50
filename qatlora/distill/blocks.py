"""Rows of logits in blocks of a size that suits the device."""

from collections.abc import Iterator

import torch
from torch import Tensor

# Elements of a block: 4 MB in fp32 stay in the cache of a CPU; a GPU wants more work.
_BLOCK_ELEMENTS = {"cpu": 2**20}
_BLOCK_ELEMENTS_ELSEWHERE = 2**24


def row_blocks(logits: Tensor) -> Iterator[slice]:
    """Split the rows of logits [C, V] into blocks."""
    elements = _BLOCK_ELEMENTS.get(logits.device.type, _BLOCK_ELEMENTS_ELSEWHERE)
    # Row-wise kernels give each thread its own rows.
    at_least = torch.get_num_threads() if logits.device.type == "cpu" else 1
    step = max(at_least, elements // logits.shape[1], 1)
    return (slice(i, min(i + step, len(logits))) for i in range(0, len(logits), step))
