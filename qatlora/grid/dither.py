"""Seeded dither: a uniform fraction in (-1/2, 1/2) for every weight, recomputed, never stored.

On an on-grid base every latent is an integer, the middle of its cell, and a small change rounds
away. Adding a fixed fraction u to the latent makes the expected level follow the change, while a
zero change keeps the level exactly: u = (k + 1/2) / 2^16 - 1/2 with a 16-bit k, so |u| < 1/2.

k comes from a counter, not from a generator with a state: the flat index of the weight in its
tensor decides it, however the rows are tiled, on every device. Four neighbours share one 64-bit
word, whose 16-bit parts are their k:

    z = (key + index / 4) * G         Weyl sequence; the key is SHA-256 of seed and tensor name
    z = (z ^ z >> 32) * M1
    z = (z ^ z >> 32) * M2

All arithmetic is int64 modulo 2^64. The shifts are arithmetic, as torch has no others for int64:
the copied sign bits cost the state two of its 64 bits and save two operators that would mask them.
This is no cryptographic generator; tests/grid/test_dither.py holds what we ask of it.

Sources: S. Vigna's and G. Steele's splitmix64 (constants), and L. Roberts, "Picture coding using
pseudo-random noise", 1962, for the dither itself.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from qatlora.errors import GridError
from qatlora.grid.types import BLOCK_SIZE

PARTS_PER_WORD = 4
PART_BITS = 16
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
CPU_TILE_WORDS = 1 << 16
DOMAIN = b"qatlora dither 1"


def dither(
    seed: int,
    tensor_name: str,
    shape: Sequence[int],
    start_row: int = 0,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Return the dither of some rows of a tensor.

    Args:
        seed: any integer; the run's seed.
        tensor_name: the weight's full name; tensors of different name are independent.
        shape: (rows, in) of the tile, or (..., in); ``in`` a multiple of 32.
        start_row: where the tile begins in the tensor, in rows of ``in`` (leading dimensions
            flattened).
        device: where to compute.

    Returns:
        fp32 of the given shape, each value (k + 1/2) / 2^16 - 1/2 with k in 0..65535; exact in
        fp32, and so is level + dither.

    Raises:
        GridError: the width is no multiple of 32.
    """
    if not shape or shape[-1] % BLOCK_SIZE:
        raise GridError(
            f"Dither was asked for shape {tuple(shape)}, but the last dimension must be a multiple "
            f"of {BLOCK_SIZE}, as in every Q4_0 tensor; tile along rows only."
        )
    zeros = torch.zeros(*shape, dtype=torch.float32, device=device)
    return Dither(seed, tensor_name).add_to(zeros, start_row)


class Dither:
    """The dither of one tensor, added to tile after tile of it."""

    def __init__(self, seed: int, tensor_name: str) -> None:
        self._key = dither_key(seed, tensor_name)
        self._kept: _Buffers | None = None

    def add_to(self, tile: Tensor, start_row: int) -> Tensor:
        """Add the dither to rows of the tensor in place, with one rounding; returns the tile.

        Args:
            tile: fp32 [..., in], contiguous; ``in`` a multiple of 32.
            start_row: where the tile begins in the tensor, as for `dither`.
        """
        flat = tile.view(-1)
        num_words = flat.numel() // PARTS_PER_WORD
        first_word = start_row * tile.shape[-1] // PARTS_PER_WORD
        # On a CPU the temporaries stay in the cache; elsewhere one launch per operator is best.
        most = CPU_TILE_WORDS if flat.device.type == "cpu" else num_words
        for start in range(0, num_words, most or 1):
            stop = min(start + most, num_words)
            offset = _signed((self._key + first_word + start) * GOLDEN)
            parts = self._buffers_for(stop - start, flat.device).parts(stop - start, offset)
            flat[start * PARTS_PER_WORD : stop * PARTS_PER_WORD].add_(parts, alpha=2.0**-PART_BITS)
        return tile

    def _buffers_for(self, num_words: int, device: torch.device) -> "_Buffers":
        """Kept from tile to tile, most of which are alike."""
        kept = self._kept
        if kept is None or kept.num_words < num_words or kept.device != device:
            kept = self._kept = _Buffers(num_words, device)
        return kept


class _Buffers:
    """Room for the words of a tile, and index * GOLDEN of its first words."""

    def __init__(self, num_words: int, device: torch.device) -> None:
        self.num_words, self.device = num_words, device
        self._ramp = torch.arange(num_words, device=device).mul_(_signed(GOLDEN))
        self._words, self._shifted = torch.empty_like(self._ramp), torch.empty_like(self._ramp)
        self._parts = torch.empty(num_words * PARTS_PER_WORD, dtype=torch.float32, device=device)

    def parts(self, num_words: int, offset: int) -> Tensor:
        """Return k + 1/2 - 2^15 of these words' parts, fp32; overwritten by the next call."""
        words = torch.add(self._ramp[:num_words], offset, out=self._words[:num_words])
        shifted = self._shifted[:num_words]
        for multiplier in (MULTIPLIER_1, MULTIPLIER_2):
            torch.bitwise_right_shift(words, 32, out=shifted)
            words.bitwise_xor_(shifted).mul_(_signed(multiplier))
        # A part read as a signed number is k - 2^15.
        parts = self._parts[: num_words * PARTS_PER_WORD]
        return parts.copy_(words.view(torch.int16)).add_(0.5)


def dither_key(seed: int, tensor_name: str) -> int:
    """Return the 64-bit key of a tensor's dither, from SHA-256 of the seed and its name."""
    text = DOMAIN + b"\0" + str(int(seed)).encode() + b"\0" + tensor_name.encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _signed(number: int) -> int:
    """Reduce an integer modulo 2^64 to the range of int64."""
    return (number + 2**63) % 2**64 - 2**63
