"""Q4_0: encode, decode, recover, search steps, dither, round. Needs torch alone."""

from qatlora.grid.dither import dither
from qatlora.grid.format import (
    BLOCK_BYTES,
    decode,
    digest,
    encode_reference,
    latents,
    nearest_levels,
    pack,
    unpack,
)
from qatlora.grid.recover import Recovered, explains, recover
from qatlora.grid.search import search_steps
from qatlora.grid.types import BLOCK_SIZE, GRID_VERSION, LEVEL_MAX, LEVEL_MIN, Q4Blocks

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_SIZE",
    "GRID_VERSION",
    "LEVEL_MAX",
    "LEVEL_MIN",
    "Q4Blocks",
    "Recovered",
    "decode",
    "digest",
    "dither",
    "encode_reference",
    "explains",
    "latents",
    "nearest_levels",
    "pack",
    "recover",
    "search_steps",
    "unpack",
]
