"""Walk over the blocks of a tensor in spans that fit the device.

On a CPU a span is so short that its buffers stay in the cache, and the spans are shared out to as
many Python threads as torch has, each of which runs its operators alone: torch releases the
interpreter lock inside operators, and threads that never meet scale better than parallel operators
with a barrier after each. On an accelerator a span only bounds the memory of the buffers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CPU_SPAN_BLOCKS = 4096
CPU_SPANS_PER_TASK = 4
ACCELERATOR_SPAN_BLOCKS = 1 << 18


def for_each_span(num_blocks: int, device: torch.device, work: Callable[[slice], None]) -> None:
    """Call ``work``, without gradients, for consecutive slices that cover ``range(num_blocks)``.

    Args:
        num_blocks: number of blocks of 32 weights.
        device: where the tensors live; decides the length of a span and the threads.
        work: called with a slice of blocks, on a CPU from several threads at once, so it may
            write only to its own slice of the results.
    """

    def walk(start: int, stop: int, length: int) -> None:
        with torch.no_grad():  # the gradient mode belongs to a thread
            for first in range(start, stop, length):
                work(slice(first, min(first + length, stop)))

    threads = torch.get_num_threads()
    task_blocks = CPU_SPAN_BLOCKS * CPU_SPANS_PER_TASK
    if device.type != "cpu":
        walk(0, num_blocks, ACCELERATOR_SPAN_BLOCKS)
    elif threads == 1 or num_blocks <= task_blocks:
        walk(0, num_blocks, CPU_SPAN_BLOCKS)
    else:
        starts = range(0, num_blocks, task_blocks)
        try:
            # In a new thread set_num_threads holds for its own operators, but also for matrix
            # products everywhere, so it is set back.
            with ThreadPoolExecutor(
                threads, initializer=torch.set_num_threads, initargs=(1,)
            ) as pool:
                tasks = pool.map(
                    lambda at: walk(at, min(at + task_blocks, num_blocks), CPU_SPAN_BLOCKS), starts
                )
                list(tasks)  # raises what a task raised
        finally:
            torch.set_num_threads(threads)
