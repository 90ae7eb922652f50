"""Q4_0: encode, decode, recover, search steps, dither, round. Needs torch alone."""

from qatlora.grid.dither import Dither, add_dither_, dither
from qatlora.grid.format import (
    BLOCK_BYTES,
    decode,
    digest,
    encode_reference,
    latents,
    nearest_levels,
    nearest_levels_,
    pack,
    unpack,
)
from qatlora.grid.fused import eager_in_user_graphs, fused
from qatlora.grid.recover import Recovered, detect, explains, recover, settle
from qatlora.grid.search import search_steps
from qatlora.grid.types import BLOCK_SIZE, GRID_VERSION, LEVEL_MAX, LEVEL_MIN, Q4Blocks

__all__ = [
    "BLOCK_BYTES",
    "BLOCK_SIZE",
    "GRID_VERSION",
    "LEVEL_MAX",
    "LEVEL_MIN",
    "Dither",
    "Q4Blocks",
    "Recovered",
    "add_dither_",
    "decode",
    "detect",
    "digest",
    "dither",
    "eager_in_user_graphs",
    "encode_reference",
    "explains",
    "fused",
    "latents",
    "nearest_levels",
    "nearest_levels_",
    "pack",
    "recover",
    "search_steps",
    "settle",
    "unpack",
]
