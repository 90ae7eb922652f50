"""Q4_0: encode, decode, recover, search steps, dither, round. Needs torch alone."""

from qatlora.grid.dither import dither
from qatlora.grid.format import (
    decode,
    digest,
    encode_reference,
    latents,
    nearest_levels,
    pack,
    unpack,
)
from qatlora.grid.recover import Recovered, detect, explains, recover, settle
from qatlora.grid.search import search_steps
from qatlora.grid.types import BLOCK_SIZE, LEVEL_MAX, LEVEL_MIN, Q4Blocks

__all__ = [
    "BLOCK_SIZE",
    "LEVEL_MAX",
    "LEVEL_MIN",
    "Q4Blocks",
    "Recovered",
    "decode",
    "detect",
    "digest",
    "dither",
    "encode_reference",
    "explains",
    "latents",
    "nearest_levels",
    "pack",
    "recover",
    "search_steps",
    "settle",
    "unpack",
]
