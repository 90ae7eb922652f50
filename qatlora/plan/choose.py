"""What fits a GPU: the longest rows per setting, and the settings to take."""

import dataclasses
from collections.abc import Iterator, Sequence

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
_STORAGES = ("q4_0", "nf4")  # the first is exact on a grid


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
    shape: ModelShape, job: Job, gpu_gb: float, row_tokens: int, teachers: Sequence[str]
) -> Job | None:
    """The first of all settings that fits.

    In this order: a better teacher, exact storage, faster settings, more rows per micro-batch.

    Args:
        shape: the architecture.
        job: adapter and ranks, which stay.
        gpu_gb: size of the card.
        row_tokens: length of a row.
        teachers: to be tried, the best first.
    """
    return next(
        (job for job in _choices(job, row_tokens, teachers) if _fits(shape, job, gpu_gb)), None
    )


def _choices(job: Job, row_tokens: int, teachers: Sequence[str]) -> Iterator[Job]:
    for teacher in teachers:
        for storage in _STORAGES:
            for leanness in _LEANNESS:
                for rows in (4, 2, 1):
                    changes = {"teacher": teacher, "storage": storage, "tokens": rows * row_tokens}
                    yield dataclasses.replace(job, **changes, **leanness)


def _fits(shape: ModelShape, job: Job, gpu_gb: float) -> bool:
    return footprint(shape, job).peak <= usable_bytes(gpu_gb)
