"""How a trained layer's base is kept in memory: NF4, packed Q4_0, or bf16.

Every store answers one question: the fp16 step of each block and the *latent* level of each
weight, t0 = weight / step, in fp32. On a grid the latents are whole numbers; elsewhere they keep
the fraction, which `deployed_weight` needs to know how far a weight is from the next level.

Shapes: out x in is the layer's weight; blocks are 32 wide, so steps are [out, in / 32].
"""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from qatlora.base.nf4 import dequantized_nf4
from qatlora.grid import (
    BLOCK_SIZE,
    Q4Blocks,
    fused,
    latents,
    nearest_levels_,
    pack,
)

# Rows are handled in tiles of about this many weights. On a CPU the dozen elementwise passes over
# a tile stay in its cache; on a GPU a tile only bounds the temporaries (about 20 bytes per weight),
# and fewer launches are better.
_TILE_WEIGHTS = {"cpu": 1 << 18}
_TILE_WEIGHTS_ELSEWHERE = 1 << 22

STEP_BITS = 16 / BLOCK_SIZE
"""Bits per weight of the fp16 steps, which every storage keeps."""

# NF4 with double quant: an 8-bit scale per 64 weights, and an fp32 one per 256 of those.
CODE_BITS = {"nf4": 4 + 8 / 64 + 32 / (64 * 256), "q4_0": 4.0, "bf16": 16.0}
"""Storage -> bits per weight beside its steps."""

Q4_0_BITS = CODE_BITS["q4_0"] + STEP_BITS

LatentReader = Callable[[Tensor, Tensor], Tensor]
"""From stored rows and their steps to latent levels [rows, in] in a new tensor: int8 or float32."""


class Store(nn.Module, ABC):
    """Steps and latent levels of one layer's base.

    Attributes:
        steps: float16 [out, in / 32].
        zero_blocks: int64 [n, 2], row and column of the blocks whose step is 0.
        on_grid: whether the checkpoint's weights lie on this grid.
    """

    steps: Tensor
    zero_blocks: Tensor

    def __init__(self, steps: Tensor, *, on_grid: bool) -> None:
        super().__init__()
        self.register_buffer("steps", steps.contiguous(), persistent=False)
        self.register_buffer("zero_blocks", torch.nonzero(steps == 0), persistent=False)
        self.on_grid = on_grid

    @property
    def read(self) -> LatentReader:
        """The function from stored rows and their steps to latents: a quotient."""
        return snapped_latents if self.on_grid else latents

    @abstractmethod
    def _rows(self) -> Tensor:
        """What is stored of every row, rows first; `read` makes latents of it and the steps."""

    @property
    @abstractmethod
    def in_features(self) -> int:
        """Width of a row."""

    def stored_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, what is stored of these rows, for `read`), tile by tile, in order."""
        stored, num_rows = self._rows(), self.steps.shape[0]
        tile_weights = _TILE_WEIGHTS.get(self.steps.device.type, _TILE_WEIGHTS_ELSEWHERE)
        tile_rows = max(1, tile_weights // self.in_features)
        for first in range(0, num_rows, tile_rows):
            rows = slice(first, min(first + tile_rows, num_rows))
            yield rows, stored[rows]

    def latent_tiles(self) -> Iterator[tuple[slice, Tensor]]:
        """Yield (rows, latent levels t0 of these rows, float32), tile by tile, in order.

        The levels are whole numbers in -8..7 where `on_grid`. The tensor may be overwritten.
        """
        for rows, stored in self.stored_tiles():
            yield rows, self.read(stored, self.steps[rows]).float()

    def levels(self) -> Tensor:
        """Each latent rounded to the nearest level, int8 [out, in]."""
        shape = (self.steps.shape[0], self.in_features)
        levels = torch.empty(shape, dtype=torch.int8, device=self.steps.device)
        for rows, stored in self.stored_tiles():
            _fill_levels(levels[rows], self.read, stored, self.steps[rows])
        return levels

    def latents(self) -> Tensor:
        """All latent levels at once, float32 [out, in]."""
        return torch.cat([tile for _, tile in self.latent_tiles()])

    @abstractmethod
    def _stored(self) -> list[Tensor]:
        """The tensors that, with the steps, determine the latents."""

    def digest(self) -> str:
        """Hex SHA-256 over the steps and whatever determines the latents."""
        digest = hashlib.sha256(f"{type(self).__name__} {self.on_grid}".encode())
        for tensor in (self.steps, *self._stored()):
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()


class Bf16Store(Store):
    """The checkpoint's own bf16 weight beside its steps (16.5 bits per weight)."""

    weight: Tensor

    def __init__(self, weight: Tensor, steps: Tensor, *, on_grid: bool) -> None:
        super().__init__(steps, on_grid=on_grid)
        self.register_buffer("weight", weight, persistent=False)

    @property
    def in_features(self) -> int:
        """Width of a row."""
        return self.weight.shape[-1]

    def _rows(self) -> Tensor:
        return self.weight

    def _stored(self) -> list[Tensor]:
        return [self.weight]


class Q4Store(Store):
    """Codes of 4 bits and steps (4.5 bits per weight), exact on an on-grid base.

    A latent base loses its fractions here, so what is stored is always on a grid. A byte holds two
    levels of a row in two's complement: column j in its low half and column j + in / 2 in the
    high one, so that whole stretches of a row unpack at once (GGUF pairs columns 16 apart).
    """

    codes: Tensor

    def __init__(self, blocks: Q4Blocks) -> None:
        super().__init__(blocks.steps, on_grid=True)
        low, high = blocks.levels.chunk(2, dim=-1)
        self.register_buffer("codes", low & 0xF | high << 4, persistent=False)

    @property
    def in_features(self) -> int:
        """Width of a row."""
        return self.steps.shape[-1] * BLOCK_SIZE

    @property
    def read(self) -> LatentReader:
        """The function that takes the levels out of the codes."""
        return unpacked_levels

    def _rows(self) -> Tensor:
        return self.codes

    def _stored(self) -> list[Tensor]:
        return [pack(Q4Blocks(self.steps, self.levels()))]


class Nf4Store(Store):
    """A bitsandbytes NF4 weight (double quant) and its source's steps (4.13 + 0.5 bits).

    NF4 alone throws a grid away; snapped to the source's steps most levels come back.
    """

    weight: Tensor

    def __init__(self, weight: Tensor, steps: Tensor, *, on_grid: bool) -> None:
        """`weight` is the `Params4bit` of a loaded `Linear4bit`, with its quant_state."""
        super().__init__(steps, on_grid=on_grid)
        self.weight = weight

    @property
    def in_features(self) -> int:
        """Width of a row."""
        return self.steps.shape[-1] * BLOCK_SIZE

    def _rows(self) -> Tensor:
        return dequantized_nf4(self.weight)

    def _stored(self) -> list[Tensor]:
        state = self.weight.quant_state
        nested = [state.state2.absmax, state.offset.reshape(1)] if state.nested else []
        return [self.weight.data, state.absmax, *nested]


def unpacked_levels(codes: Tensor, steps: Tensor) -> Tensor:
    """The levels of a `Q4Store`'s codes, int8 [rows, in]; they need no steps."""
    return torch.cat([codes << 4 >> 4, codes >> 4], dim=-1)


def snapped_latents(weight: Tensor, steps: Tensor) -> Tensor:
    """The levels of a weight that lies on the grid of its steps, float32 [rows, in]."""
    return nearest_levels_(latents(weight, steps))


@fused()
def _fill_levels(out: Tensor, read: LatentReader, stored: Tensor, steps: Tensor) -> None:
    out.copy_(nearest_levels_(read(stored, steps)))


def reciprocal(steps: Tensor) -> Tensor:
    """1 / step in float32, and 0 where the step is 0."""
    wide = steps.float()
    return torch.where(wide == 0, 0.0, 1.0 / wide)
