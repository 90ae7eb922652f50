"""Walk over the blocks of a tensor in spans that fit the device.

On a CPU a span is so short that its buffers stay in the cache, and the spans are shared out to as
many Python threads as torch has, each of which runs its operators alone: torch releases the
interpreter lock inside operators, and threads that never meet scale better than parallel operators
with a barrier after each, above all where another program wants a core. On an accelerator a span
only bounds the memory of the buffers.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch

CPU_SPAN_BLOCKS = 8192
ACCELERATOR_SPAN_BLOCKS = 1 << 18


def for_each_span(
    num_blocks: int, device: torch.device, work: Callable[[slice], None], copies: int = 1
) -> None:
    """Call ``work``, without gradients, for consecutive slices that cover ``range(num_blocks)``.

    Args:
        num_blocks: number of blocks of 32 weights.
        device: where the tensors live; decides the length of a span and the threads.
        work: called with a slice of blocks, on a CPU from several threads at once, so it may
            write only to its own slice of the results.
        copies: how many copies of its blocks ``work`` makes; spans are so much shorter.
    """
    length = CPU_SPAN_BLOCKS if device.type == "cpu" else ACCELERATOR_SPAN_BLOCKS
    share_out(spans_of(num_blocks, length // copies), device, work)


def spans_of(number: int, length: int) -> list[slice]:
    """Return slices of ``length``, the last one shorter, that cover ``range(number)``."""
    return [slice(start, min(start + length, number)) for start in range(0, number, length)]


def share_out(spans: Sequence[slice], device: torch.device, work: Callable[[slice], None]) -> None:
    """Call ``work`` for each span, without gradients and autocast; on a CPU from several threads.

    Raises:
        Exception: the first that ``work`` raised.
    """

    def step(span: slice) -> None:
        # Both modes belong to a thread.
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            work(span)

    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1 or len(spans) == 1:
        for span in spans:
            step(span)
        return
    pool = _pool(threads)
    try:
        # The number set in a thread holds for that thread's operators, but for matrix products
        # everywhere, so it is set back.
        torch.set_num_threads(1)
        list(pool.map(step, spans))  # list() raises what a thread raised
    finally:
        torch.set_num_threads(threads)


@cache
def _pool(threads: int) -> ThreadPoolExecutor:
    """Kept for good: to start threads takes as long as a span."""
    return ThreadPoolExecutor(threads, "qatlora-span", torch.set_num_threads, (1,))
