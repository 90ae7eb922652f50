"""Walk over the blocks of a tensor in spans that fit the device.

On a CPU a span is small enough that its buffers stay in the cache and that torch runs each
operator serially (its own threshold is 32,768 elements); the spans are shared out to as many
Python threads as torch has. Torch releases the interpreter lock inside operators, so this scales
better than parallel operators, which must meet at a barrier after every one. On an accelerator
a span only bounds the memory of the buffers.
"""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch

CPU_SPAN_BLOCKS = 1000
CPU_SPANS_PER_TASK = 32
ACCELERATOR_SPAN_BLOCKS = 1 << 19


def for_each_span(
    num_blocks: int,
    device: torch.device,
    work: Callable[[slice], None],
    buffers: float = 1.0,
) -> None:
    """Call ``work`` for consecutive slices that together cover ``range(num_blocks)``.

    Args:
        num_blocks: number of blocks of 32 weights.
        device: where the tensors live; decides span length and threads.
        work: called with a slice of blocks, on a CPU from several threads at once, so it may
            write only to its own slice of the results. Runs without gradients.
        buffers: how many times more memory than one fp32 copy of a block ``work`` needs; spans
            on an accelerator shrink accordingly.
    """

    def walk(start: int, stop: int, length: int) -> None:
        with torch.no_grad():  # the gradient mode belongs to a thread
            for first in range(start, stop, length):
                work(slice(first, min(first + length, stop)))

    if device.type != "cpu":
        walk(0, num_blocks, max(1, int(ACCELERATOR_SPAN_BLOCKS / buffers)))
        return
    task_blocks = CPU_SPAN_BLOCKS * CPU_SPANS_PER_TASK
    threads = min(torch.get_num_threads(), -(-num_blocks // task_blocks))
    if threads <= 1:
        walk(0, num_blocks, CPU_SPAN_BLOCKS)
        return

    def task(start: int) -> None:
        walk(start, min(start + task_blocks, num_blocks), CPU_SPAN_BLOCKS)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(task, range(0, num_blocks, task_blocks)))  # list() raises what a task raised
