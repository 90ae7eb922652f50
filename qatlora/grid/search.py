"""Search the fp16 step that costs a block least, for weights that lie on no grid.

The error of a block is sum(importance * (weight - step * level)^2) with the level nearest to
weight / step in -8..7. For fixed levels the best step and its gain have a closed form (least
squares), so candidates peak / c are rounded to levels, each set of levels gets its best step, and
the set with the largest gain wins. A negative c gives the peak a negative level, down to -8; a
positive one ends at 7 and is better where the other end needs the -8. |c| above 8 clips the peak,
which pays if few other weights are large or the peak matters little.

The winner's levels are rounded anew with its step, which may gain once more, and the last choice
is made by the error itself, after fp16, with the reference encoder's peak / -8 among the
candidates: no block becomes worse than under the reference.

llama.cpp's own search (make_qx_quants in ggml/src/ggml-quants.c, used with an importance matrix)
takes the candidates -7.1, -7.2 .. -8.9 alone and never rounds anew. It never finds a peak level
of 6 or less, and rounds its step to fp16 without looking at what the levels make of it. With an
importance our candidates are a superset of its.
"""

import torch
from torch import Tensor

from qatlora.errors import GridError
from qatlora.grid.format import first_peaks, latents, nearest_levels, split_blocks
from qatlora.grid.spans import for_each_span
from qatlora.grid.types import BLOCK_SIZE, LEVEL_MAX, LEVEL_MIN

FP16_MAX = 65504.0
# Without importance the peak always matters, and a spacing of 0.25 is within 0.05 % of the optimum.
PLAIN_PEAK_LEVELS = (
    *(-c / 4 for c in range(20, 39)),
    *(c / 2 for c in range(15, 19)),
)
# With importance the peak may be clipped hard.
WEIGHTED_PEAK_LEVELS = (
    *(-c / 4 for c in range(18, 29)),
    *(-c / 10 for c in range(71, 90)),
    *(-c / 4 for c in range(36, 48, 2)),
    *(-float(c) for c in range(12, 21)),
    *(c / 4 for c in range(29, 40)),
    *(float(c) for c in range(10, 21)),
)


def search_steps(weight: Tensor, importance: Tensor | None = None) -> Tensor:
    """Return the step of each block that minimizes the squared error of nearest levels.

    Args:
        weight: floating point [..., in]; ``in`` a multiple of 32.
        importance: non-negative, broadcastable to the weight, for example [in] (the mean squared
            inputs of an importance matrix). A block that it gives no weight at all is searched
            without it.

    Returns:
        fp16 [..., in / 32], of either sign; 0 for an all-zero block.

    Raises:
        GridError: width is no multiple of 32, a weight is not finite, or the importance does not
            fit or is negative.
    """
    blocks = split_blocks(weight)
    weights = None if importance is None else _importance_blocks(importance, weight.shape)
    steps = torch.empty(len(blocks), dtype=torch.float16, device=blocks.device)

    def search(span: slice) -> None:
        part = None if weights is None else weights[span].float()
        steps[span] = best_steps(blocks[span].float(), part)

    for_each_span(len(blocks), blocks.device, search)
    return steps.view(*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE)


def best_steps(values: Tensor, importance: Tensor | None = None) -> Tensor:
    """Search the steps, fp16 [n], of blocks [n, 32] in fp32, importance alike."""
    peaks = first_peaks(values)
    if importance is not None:
        importance = torch.where(importance.sum(-1, keepdim=True) > 0, importance, 1.0)
    levels_of_peaks = PLAIN_PEAK_LEVELS if importance is None else WEIGHTED_PEAK_LEVELS
    gains = values.new_empty(len(levels_of_peaks), len(values))
    steps = torch.empty_like(gains)
    for peak_level, gain, step in zip(levels_of_peaks, gains, steps, strict=True):
        _least_squares(values, importance, peaks / peak_level, gain, step)
    # nan: all weights that matter are at level 0.
    best = gains.nan_to_num_(nan=-1.0).argmax(0, keepdim=True)
    chosen = steps.gather(0, best).squeeze(0)
    again, gain = torch.empty_like(chosen), torch.empty_like(chosen)
    _least_squares(values, importance, chosen, gain, again)
    reference = peaks / LEVEL_MIN
    candidates = torch.stack([reference, chosen, again]).nan_to_num_(nan=0.0)
    candidates = candidates.clamp_(-FP16_MAX, FP16_MAX).half()
    errors = torch.stack([_errors(values, importance, step) for step in candidates])
    return candidates.gather(0, errors.argmin(0, keepdim=True)).squeeze(0)


def _least_squares(
    values: Tensor, importance: Tensor | None, supposed: Tensor, gain: Tensor, step: Tensor
) -> None:
    """Round blocks to levels with ``supposed`` steps; write the best step for these levels.

    ``gain``, the error that the step saves against zeros, is written too. Both fp32 [n].
    """
    levels = (values * supposed.reciprocal().unsqueeze(1)).round_().clamp_(LEVEL_MIN, LEVEL_MAX)
    weighted = levels if importance is None else levels * importance
    products = (weighted * values).sum(-1)
    torch.div(products, (weighted * levels).sum(-1), out=step)
    torch.mul(products, step, out=gain)


def _errors(values: Tensor, importance: Tensor | None, steps: Tensor) -> Tensor:
    """Return the error [n] of decoding the nearest levels of fp16 steps."""
    levels = nearest_levels(latents(values, steps.unsqueeze(1)))
    residuals = levels.mul(steps.float().unsqueeze(1)).sub_(values).square_()
    return (residuals if importance is None else residuals.mul_(importance)).sum(-1)


def _importance_blocks(importance: Tensor, shape: torch.Size) -> Tensor:
    """Broadcast the importance to the weight and cut it into blocks [n, 32]."""
    try:
        whole = importance.detach().expand(shape)
    except RuntimeError:
        whole = None
    if whole is None or bool((importance < 0).any()):
        raise GridError(
            f"An importance of shape {tuple(importance.shape)} for a weight of shape "
            f"{tuple(shape)} must broadcast to the weight and must not be negative; pass one value "
            f"per input column, {shape[-1]} in all, or one per weight."
        )
    return whole.reshape(-1, BLOCK_SIZE)
