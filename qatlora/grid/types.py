"""The one value that defines a deployed Q4_0 tensor.

Shapes in this room: ``in`` is the contraction dimension (always last), cut into blocks of 32;
``...`` are the rows (out features, or experts x out features).
"""

from typing import NamedTuple

from torch import Tensor

BLOCK_SIZE = 32
LEVEL_MIN = -8
LEVEL_MAX = 7
GRID_VERSION = 1
"""Counted up when the same weights or adapter would get other steps or levels."""


class Q4Blocks(NamedTuple):
    """A tensor on the Q4_0 grid: weight[..., i] = steps[..., i // 32] * levels[..., i].

    steps: float16 [..., in / 32]; levels: int8 [..., in], each in -8..7.
    """

    steps: Tensor
    levels: Tensor
