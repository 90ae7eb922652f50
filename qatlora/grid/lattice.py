"""Which steps explain stored weights, once their levels are supposed?

A stored weight w at level l came from a step in the interval of reals that the stored type rounds
to w, divided by l. A step for the block exists exactly if its 32 intervals intersect. The fp16
number nearest to the middle of the intersection lies inside it if any does, up to ties at its two
ends, which the neighbours of that number settle.

Operators that make booleans out of whole blocks are slow in torch on a CPU (1 to 6 ns a weight
against 0.3), so the common path gets along without them.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from qatlora.grid.types import LEVEL_MAX, LEVEL_MIN

# Half the spacing of the stored type, in units of the last bit of fp32. What fp32 stores is exact
# but for the rounding of the product; one bit covers it.
HALF_SPACING = {torch.bfloat16: 1 << 15, torch.float16: 1 << 12}
FP16_ROUNDING = 2.0**-11
# The bounds carry errors of about 2^-23. An fp16 step times a level differs from the end of a bf16
# or fp16 interval by 2^-15 or not at all, so this slack decides no such case wrongly.
SLACK = 2.0**-20


class Extremes(NamedTuple):
    """fp32 [n] each: the highest and lowest value of a block and its largest magnitude."""

    highest: Tensor
    lowest: Tensor
    peaks: Tensor


class Fit(NamedTuple):
    """Supposed levels of n blocks and the intersection [low, high] of the steps that explain them.

    levels: fp32 integers [n, 32] in -8..8, for a positive step. signs: int8 [n], -1 where only a
    negative step turns a level of 8 into -8. low, high: fp32 [n]; no step explains a block with
    low > high, nor one with both -8 and 8 (low is infinite).
    """

    levels: Tensor
    signs: Tensor
    low: Tensor
    high: Tensor

    def of(self, blocks: Tensor) -> "Fit":
        """Return the fits of some blocks, by their numbers."""
        return Fit(*(part[blocks] for part in self))

    def possible(self) -> Tensor:
        """Tell where any step may explain the block, given the errors of the bounds: bool [n]."""
        return self.low * (1 - SLACK) <= self.high * (1 + SLACK)

    def middle(self) -> Tensor:
        """Return the fp16 steps nearest to the middle of the intersections: [n], positive."""
        return ((self.low + self.high) * 0.5).half()


class Verdict(NamedTuple):
    """The best fp16 step of n blocks for given levels, and how well it does.

    steps: fp16 [n], positive. exact: bool [n], decoding gives the stored values. explained: bool
    [n], exact, or some step that fp16 holds within its rounding explains the stored values.
    """

    steps: Tensor
    exact: Tensor
    explained: Tensor


def find_extremes(values: Tensor) -> Extremes:
    """Return the extremes of blocks [n, 32]; nan where a value is."""
    highest, lowest = values.amax(-1), values.amin(-1)
    return Extremes(highest, lowest, torch.maximum(highest, -lowest))


def fit_levels(
    values: Tensor, extremes: Extremes, peak_levels: Tensor | int, dtype: torch.dtype
) -> Fit:
    """Round blocks to the levels that put their peaks at ``peak_levels``, and bound the steps.

    Args:
        values: fp32 [n, 32], the stored values.
        extremes: theirs.
        peak_levels: one level in 1..8, or fp32 [n].
        dtype: type in which the checkpoint stores the values.
    """
    scale = peak_levels / extremes.peaks
    levels = (values * scale.unsqueeze(1)).round_()
    inverse = levels.reciprocal()  # infinite at level 0
    outer, inner = _rounding_cells(values, dtype)
    # Level and value have one sign, and positive floats are ordered as their bit patterns are,
    # whose minimum takes half the time.
    high = outer.mul_(inverse).view(torch.int32).amin(-1).view(torch.float32)
    # Level 0 explains a zero with any step (0 * inf = nan bounds nothing) and no other value.
    low = inner.mul_(inverse).nan_to_num_(nan=0.0).amax(-1)
    over = extremes.highest * scale > LEVEL_MAX + 0.5
    under = extremes.lowest * scale < LEVEL_MIN + 0.5
    low.masked_fill_(over & under, math.inf)
    return Fit(levels, 1 - 2 * over.to(torch.int8), low, high)


def certain(fit: Fit, steps: Tensor) -> Tensor:
    """Tell where ``steps`` (fp16 [n]) lie inside the intersection, clear of its ends: bool [n].

    Then decoding is exact. Never true of blocks stored in fp32: their cells are no wider than the
    errors of the bounds.
    """
    step = steps.float()
    return torch.minimum(step - fit.low, fit.high - step) > step * SLACK


def judge(fit: Fit, stored: Tensor) -> Verdict:
    """Find the best fp16 step of each block by decoding, at the ends of the intersections too."""
    middle = fit.middle()
    low, high = fit.low * (1 - SLACK), fit.high * (1 + SLACK)
    steps, exact = middle.clone(), torch.zeros_like(middle, dtype=torch.bool)
    for neighbour in (0, 1, -1):
        candidates = (middle.view(torch.int16) + neighbour).view(torch.float16)
        step = candidates.float()
        possible = torch.nonzero(~exact & (low <= step) & (step <= high)).squeeze(1)
        products = fit.levels[possible] * step[possible].unsqueeze(1)
        found = possible[_same(products, stored[possible])]
        steps[found] = candidates[found]
        exact[found] = True
    step = steps.float()
    explained = (low <= high) & (step * (1 + FP16_ROUNDING) >= low)
    explained &= step * (1 - FP16_ROUNDING) <= high
    return Verdict(steps, exact, exact | explained)


def _same(products: Tensor, stored: Tensor) -> Tensor:
    """Tell where products [n, 32], rounded to the type of ``stored``, equal it: bool [n]."""
    residuals = products.to(stored.dtype).float().sub_(stored)
    return residuals.abs_().amax(-1) == 0  # nan, of two infinities, is not


def _rounding_cells(values: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return the ends, away from and toward zero, of the reals that ``dtype`` rounds to values.

    They lie half a spacing away, which is one distance of fp32 bit patterns for all numbers that
    are normal in ``dtype``, right at powers of two as well.
    """
    half_spacing = HALF_SPACING.get(dtype, 1)
    patterns = values.view(torch.int32)
    outer = (patterns + half_spacing).view(torch.float32)
    inner = (patterns - half_spacing).view(torch.float32)
    if dtype == torch.float16:  # subnormal numbers are 2^-24 apart
        offset = torch.full_like(values, 2.0**-25).copysign_(values)
        subnormal = values.abs() < 2.0**-14
        outer = torch.where(subnormal, values + offset, outer)
        inner = torch.where(subnormal & (values != 0), values - offset, inner)
    return outer, inner
