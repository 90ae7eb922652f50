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
WORD_BITS = 64
GOLDEN = 0x9E3779B97F4A7C15
MULTIPLIER_1 = 0xBF58476D1CE4E5B9
MULTIPLIER_2 = 0x94D049BB133111EB
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
    tile = torch.zeros(*shape, dtype=torch.float32, device=device)
    flat = tile.view(-1, shape[-1])
    rows = slice(start_row, start_row + len(flat))
    add_dither_(flat, *Dither(seed, tensor_name).ramps(rows, shape[-1], tile.device))
    return tile


class Dither:
    """The dither of one tensor, as the words that single rows of it need."""

    def __init__(self, seed: int, tensor_name: str) -> None:
        self._key = dither_key(seed, tensor_name)

    def ramps(self, rows: slice, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return int64 [rows, 1] and [1, width / 4], whose sum is the Weyl sequence of the rows.

        Args:
            rows: which ones, leading dimensions flattened; start and stop must be given.
            width: ``in``, a multiple of 32.
            device: where to compute.
        """
        per_row = width // PARTS_PER_WORD
        ramp = torch.arange(rows.start, rows.stop, device=device).mul_(_signed(per_row * GOLDEN))
        by_column = torch.arange(per_row, device=device).mul_(_signed(GOLDEN))
        return ramp.add_(_signed(self._key * GOLDEN)).unsqueeze(1), by_column.unsqueeze(0)


def add_dither_(tile: Tensor, by_row: Tensor, by_column: Tensor) -> Tensor:
    """Add the dither to a tile fp32 [rows, in] in place, with one rounding, from its `ramps`."""
    words = by_row + by_column
    for multiplier in (MULTIPLIER_1, MULTIPLIER_2):
        words.bitwise_xor_(words >> 32).mul_(_signed(multiplier))
    # A part read as a signed number is k - 2^15.
    return tile.add_(_parts(words).float().add_(0.5), alpha=2.0**-PART_BITS)


def _parts(words: Tensor) -> Tensor:
    """Split int64 [rows, n] into its signed 16-bit parts [rows, 4 n], the lowest first."""
    if not torch.compiler.is_compiling():
        return words.view(torch.int16)
    # The same by shifts: a compiled kernel would write the words to memory to view them.
    lifts = torch.arange(WORD_BITS - PART_BITS, -1, -PART_BITS, device=words.device)
    return (words.unsqueeze(-1) << lifts >> WORD_BITS - PART_BITS).flatten(-2)


def dither_key(seed: int, tensor_name: str) -> int:
    """Return the 64-bit key of a tensor's dither, from SHA-256 of the seed and its name."""
    text = DOMAIN + b"\0" + str(int(seed)).encode() + b"\0" + tensor_name.encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "little")


def _signed(number: int) -> int:
    """Reduce an integer modulo 2^64 to the range of int64."""
    return (number + 2**63) % 2**64 - 2**63
