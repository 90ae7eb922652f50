"""Find the Q4_0 grid that a checkpoint lies on, block by block, and say where there is none.

A QAT checkpoint stores step * level rounded to its own type, usually bf16, and its blocks seldom
reach level -8, so the reference encoder (peak / -8) puts most of them on a wrong grid.

Method. If the peak of a block has level k, its step is near peak / k and each level is the nearest
integer of weight * k / peak. `lattice.py` then says exactly which steps explain the block. A block
is *on the grid* if some step does and fp16 can hold that step within its rounding, 2^-11: decoding
gives the stored values bit for bit, or, where the checkpoint's own step was finer than fp16, values
within 2^-11 of ones that round to the stored values.

No error is estimated or tolerated, which makes this a detector, too. The 32 weights of an ordinary
block would each have to fall by chance into a cell of relative width 2^-7 or less around one of the
levels, and none between zero and the first. Blocks that any grid explains count as on the grid: all
zero (step 0), or one magnitude and zeros (levels -1, 0, 1). A block of very few non-zero weights
can be on a grid by chance, so judge models by their share of blocks, not by single ones.

If the levels have a common divisor several steps explain the block: one that is exact in fp16 is
preferred, and among those the largest. The step is positive, unless a positive peak has level 8,
which only -8 and a negative step can hold.

Speed. Most peaks have level 3 to 8, and eight weights of a block tell which. A first pass solves
the clear cases. The second looks at the doubtful ones more closely, the third tries every peak
level, and the last searches a step for what is off the grid.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from qatlora.grid.format import (
    check_finite,
    decode,
    join_blocks,
    latents,
    nearest_levels,
    split_blocks,
)
from qatlora.grid.lattice import Fit, certain, find_extremes, fit_levels, judge
from qatlora.grid.search import best_steps
from qatlora.grid.spans import for_each_span
from qatlora.grid.types import BLOCK_SIZE, LEVEL_MIN, Q4Blocks

# Rising: levels 0, 2, 4, 8 alone fit peaks of 4 and 8 equally well, and the larger step is wanted.
COMMON_PEAK_LEVELS = (3, 4, 5, 6, 7, 8)
NUM_SAMPLED = 8
# Two stored values, each within 2^-8 of a step times a level, at most 8: 8 * 2^-7 and some more.
SAMPLE_TOLERANCE = 0.07


class Recovered(NamedTuple):
    """What ``recover`` found.

    blocks: steps and levels. Off the grid: searched steps and nearest levels.
    on_grid: bool [..., in / 32].
    """

    blocks: Q4Blocks
    on_grid: Tensor


class _State(NamedTuple):
    """What is known of n blocks so far.

    steps: fp16 [n]. levels: int8 [n, 32]. on_grid: bool [n]. peak_levels: fp32 [n], the level of
    the peak in 3..8 if it is one of these, 0 if the block cannot be on a grid.
    """

    steps: Tensor
    levels: Tensor
    on_grid: Tensor
    peak_levels: Tensor

    @classmethod
    def empty(cls, num_blocks: int, device: torch.device) -> "_State":
        return cls(
            steps=torch.empty(num_blocks, dtype=torch.float16, device=device),
            levels=torch.empty(num_blocks, BLOCK_SIZE, dtype=torch.int8, device=device),
            on_grid=torch.empty(num_blocks, dtype=torch.bool, device=device),
            peak_levels=torch.empty(num_blocks, dtype=torch.float32, device=device),
        )

    def of(self, blocks: slice | Tensor) -> "_State":
        return _State(*(part[blocks] for part in self))


def recover(weight: Tensor) -> Recovered:
    """Find the step and levels of every block of a checkpoint's weight.

    Args:
        weight: [..., in] as stored: bf16, fp16 or fp32; ``in`` a multiple of 32.

    Raises:
        GridError: width is no multiple of 32, or a weight is not finite.
    """
    stored = split_blocks(weight)
    state = _State.empty(len(stored), stored.device)

    def solve_clear(span: slice) -> None:
        _solve_clear(stored[span], state.of(span))

    for_each_span(len(stored), stored.device, solve_clear)
    for solve, may_succeed in ((_solve_doubtful, True), (_solve_any, True), (_search, False)):
        open_blocks = ~state.on_grid
        if may_succeed:
            open_blocks &= state.peak_levels > 0
        _solve_again(solve, torch.nonzero(open_blocks).squeeze(1), stored, state)
    blocks = join_blocks(state.steps, state.levels, weight.shape)
    return Recovered(blocks, state.on_grid.view(blocks.steps.shape))


def explains(blocks: Q4Blocks, weight: Tensor) -> Tensor:
    """Tell where decoding gives the stored weight exactly: bool [..., in / 32].

    Decoded values are rounded to the weight's type. 0.0 and -0.0 count as equal: Q4_0 has one zero.
    """
    same = decode(blocks, weight.dtype) == weight
    return same.reshape(*blocks.steps.shape, BLOCK_SIZE).all(-1)


def _solve_again(
    solve: Callable[[Tensor, _State], None], blocks: Tensor, stored: Tensor, state: _State
) -> None:
    """Gather some blocks, ``solve`` them in spans and put the results back."""

    def work(span: slice) -> None:
        at = blocks[span]
        part = state.of(at)
        solve(stored[at], part)
        for whole, solved in zip(state, part, strict=True):
            whole[at] = solved

    for_each_span(len(blocks), stored.device, work)


def _solve_clear(stored: Tensor, state: _State) -> None:
    """Solve the blocks whose step lies well inside the intersection; fill the whole state."""
    values = stored.float()
    extremes = find_extremes(values)
    check_finite(extremes.peaks)
    _suppose_peak_levels(values, extremes.peaks, state.peak_levels)
    fit = fit_levels(values, extremes, state.peak_levels, stored.dtype)
    steps = fit.middle()
    _store(fit, steps, certain(fit, steps), state)


def _solve_doubtful(stored: Tensor, state: _State) -> None:
    """Solve the blocks whose step lies at an end of the intersection, or is no fp16 number."""
    values = stored.float()
    fit = fit_levels(values, find_extremes(values), state.peak_levels, stored.dtype)
    verdict = judge(fit, stored)
    _store(fit, verdict.steps, verdict.explained, state)


def _store(fit: Fit, steps: Tensor, explained: Tensor, state: _State) -> None:
    """Store fits. Final are those that are explained and leave no larger step to be tried."""
    # A level of 1 or -1 leaves no common divisor.
    distance_to_one = fit.levels.abs().sub_(1.0).abs_().amin(-1)
    torch.logical_and(explained, distance_to_one == 0, out=state.on_grid)
    torch.mul(steps, fit.signs, out=state.steps)
    state.levels.copy_(fit.levels).mul_(fit.signs.unsqueeze(1))


def _suppose_peak_levels(values: Tensor, peaks: Tensor, peak_levels: Tensor) -> None:
    """Write the peak level that puts a sample of a block's weights nearest to integers.

    0 where even that is too far. An all-zero block counts as fitting.
    """
    # Sampled weights first in memory, too, so that operators run along n.
    sample = values.new_empty(NUM_SAMPLED, len(values))
    torch.div(values[:, :NUM_SAMPLED].t(), peaks, out=sample)
    levels = torch.tensor(COMMON_PEAK_LEVELS, dtype=torch.float32, device=values.device)
    misfits = sample.new_empty(len(levels), len(values))
    scaled, rounded = torch.empty_like(sample), torch.empty_like(sample)
    for peak_level, misfit in zip(COMMON_PEAK_LEVELS, misfits, strict=True):
        torch.round(torch.mul(sample, peak_level, out=scaled), out=rounded)
        torch.amax(scaled.sub_(rounded).abs_(), 0, out=misfit)
    least, chosen = misfits.min(0)
    torch.index_select(levels, 0, chosen, out=peak_levels)
    peak_levels.masked_fill_(least > SAMPLE_TOLERANCE, 0.0)


def _solve_any(stored: Tensor, state: _State) -> None:
    """Try every peak level from the largest step down; keep the first exact fit, else the first."""
    values = stored.float()
    extremes = find_extremes(values)
    exact = extremes.peaks == 0
    state.on_grid.copy_(exact)
    state.steps.zero_()
    state.levels.zero_()
    for peak_level in range(1, 1 - LEVEL_MIN):
        fit = fit_levels(values, extremes, peak_level, stored.dtype)
        verdict = judge(fit, stored)
        better = (verdict.exact & ~exact) | (verdict.explained & ~state.on_grid)
        at = torch.nonzero(better).squeeze(1)
        state.steps[at] = verdict.steps[at] * fit.signs[at]
        state.levels[at] = fit.levels[at].to(torch.int8) * fit.signs[at].unsqueeze(1)
        state.on_grid[at] = True
        exact |= verdict.exact


def _search(stored: Tensor, state: _State) -> None:
    """Give blocks off the grid the step that costs least, and the nearest levels."""
    values = stored.float()
    state.steps.copy_(best_steps(values))
    state.levels.copy_(nearest_levels(latents(values, state.steps.unsqueeze(1))))
