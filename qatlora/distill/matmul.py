"""Products with an output matrix of bf16 weights, kept in fp32.

A bf16 matmul rounds its result to bf16: a logit of 20 then carries an error of up to 0.06, which
alone is about 1e-3 nats of KL divergence, more than some quantizations cost. Multiplying in bf16
and *returning* the fp32 sums costs the same time and leaves only the rounding of the factors:

- CPU: oneDNN does it for fp32 arguments when its matmul precision is set to "bf16";
- CUDA: `torch.mm(..., out_dtype=torch.float32)`.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def multiply_transposed(
    left: Tensor, right: Tensor, compute_dtype: torch.dtype, out: Tensor | None = None
) -> Tensor:
    """Return left @ right.T with factors rounded to `compute_dtype` and the sums kept.

    Args:
        left: [n, k], any float dtype.
        right: [m, k], any float dtype; converted as a whole, so pass slices of large matrices.
        compute_dtype: bfloat16, float32 or float64.
        out: [n, m], where the result goes; a large new tensor costs a page fault per 4 kB on a CPU.

    Returns:
        [n, m], float32 (float64 for a float64 `compute_dtype`).
    """
    if compute_dtype != torch.bfloat16:
        return torch.mm(left.to(compute_dtype), right.to(compute_dtype).t(), out=out)
    left, right = left.to(torch.bfloat16), right.to(torch.bfloat16)
    if left.device.type == "cuda":
        return torch.mm(left, right.t(), out_dtype=torch.float32, out=out)
    with _bf16_products_on_cpu():
        return torch.mm(left.float(), right.float().t(), out=out)


@contextmanager
def _bf16_products_on_cpu() -> Iterator[None]:
    """Let oneDNN multiply fp32 arguments as bf16; exact here, because they hold bf16 values."""
    matmul: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before
