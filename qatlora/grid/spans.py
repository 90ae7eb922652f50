"""Walk over the blocks of a tensor in spans that fit the device.

On a CPU a span is so short that its buffers stay in the cache, and the spans are shared out to as
many Python threads as torch has, each of which runs its operators alone: torch releases the
interpreter lock inside operators, and threads that never meet scale better than parallel operators
with a barrier after each. On an accelerator a span only bounds the memory of the buffers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CPU_SPAN_BLOCKS = 8192
ACCELERATOR_SPAN_BLOCKS = 1 << 18


def span_blocks(device: torch.device) -> int:
    """Blocks of a span on this device."""
    return CPU_SPAN_BLOCKS if device.type == "cpu" else ACCELERATOR_SPAN_BLOCKS


def for_each_span(num_blocks: int, device: torch.device, work: Callable[[slice], None]) -> None:
    """Call ``work``, without gradients, for consecutive slices that cover ``range(num_blocks)``.

    Args:
        num_blocks: number of blocks of 32 weights.
        device: where the tensors live; decides the length of a span and the threads.
        work: called with a slice of blocks, on a CPU from several threads at once, so it may
            write only to its own slice of the results.
    """
    length = span_blocks(device)

    def step(start: int) -> None:
        with torch.no_grad():  # the gradient mode belongs to a thread
            work(slice(start, min(start + length, num_blocks)))

    starts = range(0, num_blocks, length)
    if device.type != "cpu":
        for start in starts:
            step(start)
        return
    threads = torch.get_num_threads()
    try:
        # Set in a thread, the number holds for that thread's operators, but for matrix products
        # everywhere, so it is set back.
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
            list(pool.map(step, starts))  # list() raises what a thread raised
    finally:
        torch.set_num_threads(threads)
