"""What fits a GPU: the longest rows per setting, and the settings to take."""

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qatlora.plan.footprint import Job, footprint
from qatlora.plan.shape import ModelShape

# What the driver, the context and the allocator's fragments take of a card.
_RESERVED_SHARE = 0.06
# From fast to lean: a dense evaluation, then a packed one, then activations computed again.
_LEANNESS = (
    {"holds_weights": True, "checkpointing": False, "keep_blocks": True},
    {"holds_weights": False, "checkpointing": False, "keep_blocks": True},
    {"holds_weights": False, "checkpointing": False, "keep_blocks": False},
    {"holds_weights": False, "checkpointing": True, "keep_blocks": False},
)
LEANEST = _LEANNESS[-1]


@dataclass(frozen=True)
class Allowed:
    """What a base can be, the best first.

    Attributes:
        teachers: of memory, self, cache and none; self goes with storage q4_0 alone.
        storages: of q4_0, which is exact on a grid, and nf4.
    """

    teachers: tuple[str, ...]
    storages: tuple[str, ...] = ("q4_0", "nf4")


def usable_bytes(gpu_gb: float) -> float:
    """Of a card that is sold with `gpu_gb` (of 2^30 bytes)."""
    return gpu_gb * 2**30 * (1 - _RESERVED_SHARE)


def longest_row(
    shape: ModelShape, job: Job, gpu_gb: float, lengths_tokens: Sequence[int]
) -> int | None:
    """The longest of the given rows that fits, one per micro-batch, in the leanest settings."""
    fitting = [
        length
        for length in lengths_tokens
        if _fits(shape, dataclasses.replace(job, tokens=length, **LEANEST), gpu_gb)
    ]
    return max(fitting, default=None)


def recommend(
    shape: ModelShape, job: Job, gpu_gb: float, row_tokens: int, allowed: Allowed
) -> Job | None:
    """The first of all settings that fits.

    In this order: a better teacher, exact storage, faster settings, more rows per micro-batch.

    Args:
        shape: the architecture.
        job: adapter and ranks, which stay.
        gpu_gb: size of the card.
        row_tokens: length of a row.
        allowed: what is tried.
    """
    return next(
        (job for job in _choices(job, row_tokens, allowed) if _fits(shape, job, gpu_gb)), None
    )


def _choices(job: Job, row_tokens: int, allowed: Allowed) -> Iterator[Job]:
    for teacher, storage in itertools.product(allowed.teachers, allowed.storages):
        if teacher == "self" and storage != "q4_0":
            continue
        for leanness, rows in itertools.product(_LEANNESS, (4, 2, 1)):
            changes = {"teacher": teacher, "storage": storage, "tokens": rows * row_tokens}
            yield dataclasses.replace(job, **changes, **leanness)


def _fits(shape: ModelShape, job: Job, gpu_gb: float) -> bool:
    return footprint(shape, job).peak <= usable_bytes(gpu_gb)
