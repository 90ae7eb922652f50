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

Speed. Nearly every block has a weight at level 1 or -1, which is then its smallest but zero, and
the peak divided by it is the peak's level; above 8 there is no grid. A first pass solves the blocks
of which that leaves no doubt. The second looks at the doubtful ones more closely, the third tries
every peak level, and the last searches a step for what is off the grid.
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

# Two stored values, each within 2^-8 of a level times the step: 8 * (1 + 2^-7), and some more.
MAX_PEAK_RATIO = 8.07
_NO_FIT = 100  # a rank behind those of all fits
PATTERN_MASK = 0x7FFFFFFF  # all bits of an fp32 number but its sign


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
    the peak in 1..8 if some weight has level 1 or -1; 0 if the block cannot be on a grid.
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
    state, rest = _solve(stored)
    _solve_again(_search, rest, stored, state)
    blocks = join_blocks(state.steps, state.levels, weight.shape)
    return Recovered(blocks, state.on_grid.view(blocks.steps.shape))


def detect(weight: Tensor) -> Tensor:
    """Tell which blocks of a checkpoint's weight lie on a grid: bool [..., in / 32].

    The same answer as ``recover`` gives, without the search of steps for the other blocks, which
    takes most of its time on ordinary weights.

    Raises:
        GridError: width is no multiple of 32, or a weight is not finite.
    """
    stored = split_blocks(weight)
    state, _ = _solve(stored)
    return state.on_grid.view(*weight.shape[:-1], weight.shape[-1] // BLOCK_SIZE)


def _solve(stored: Tensor) -> tuple[_State, Tensor]:
    """Solve every block [n, 32] that is on a grid; return the state and the other blocks."""
    state = _State.empty(len(stored), stored.device)
    unsolved = [torch.empty(0, dtype=torch.int64, device=stored.device)]

    def solve_clear(span: slice) -> None:
        part = state.of(span)
        _solve_clear(stored[span], part)
        unsolved.append(torch.nonzero(~part.on_grid).squeeze(1) + span.start)

    for_each_span(len(stored), stored.device, solve_clear)
    rest = torch.cat(unsolved)
    for solve, copies in ((_solve_doubtful, 1), (_solve_any, -LEVEL_MIN)):
        _solve_again(solve, rest[state.peak_levels[rest] > 0], stored, state, copies)
        rest = rest[~state.on_grid[rest]]
    return state, rest


def explains(blocks: Q4Blocks, weight: Tensor) -> Tensor:
    """Tell where decoding gives the stored weight exactly: bool [..., in / 32].

    Decoded values are rounded to the weight's type. 0.0 and -0.0 count as equal: Q4_0 has one zero.
    """
    same = decode(blocks, weight.dtype) == weight
    return same.reshape(*blocks.steps.shape, BLOCK_SIZE).all(-1)


def settle(blocks: Q4Blocks, stored: torch.dtype = torch.bfloat16) -> Q4Blocks:
    """Return the blocks that `recover` finds in these blocks' values as a checkpoint stores them.

    A step of 11 significant bits times a level does not fit bf16, and of the few steps that round
    to the same stored values recovery takes one. It is the same one every time, so settled blocks
    survive a bf16 checkpoint bit for bit, and their decoded bf16 values are those of `blocks`.

    Args:
        blocks: any steps of either sign; levels with a common divisor become smaller.
        stored: type of the checkpoint.
    """
    return recover(decode(blocks, stored)).blocks


def _solve_again(
    solve: Callable[[Tensor, _State], None],
    blocks: Tensor,
    stored: Tensor,
    state: _State,
    copies: int = 1,
) -> None:
    """Gather some blocks, ``solve`` them in spans and put the results back.

    ``solve`` is given peak levels and fills in all else; it works on so many ``copies`` of them.
    """

    def work(span: slice) -> None:
        at = blocks[span]
        part = _State.empty(len(at), stored.device)
        part.peak_levels.copy_(state.peak_levels[at])
        solve(stored[at], part)
        for whole, solved in zip(state, part, strict=True):
            whole[at] = solved

    for_each_span(len(blocks), stored.device, work, copies)


def _solve_clear(stored: Tensor, state: _State) -> None:
    """Solve the blocks whose step lies well inside the intersection; fill the whole state."""
    values = stored.float()
    extremes = find_extremes(values)
    check_finite(extremes.peaks)
    state.peak_levels.copy_(_suppose_peak_levels(values, extremes.peaks))
    fit = fit_levels(values, extremes, state.peak_levels, stored.dtype)
    steps = fit.middle()
    _store(fit, steps, certain(fit, steps), state)


def _solve_doubtful(stored: Tensor, state: _State) -> None:
    """Solve the blocks whose step lies at an end of the intersection, or is no fp16 number."""
    values = stored.float()
    fit = fit_levels(values, find_extremes(values), state.peak_levels, stored.dtype)
    verdict = judge(fit, stored)
    # Below 5 the levels times 2 or more, with a finer step, may still be exact.
    final = verdict.exact | (verdict.explained & (state.peak_levels > -LEVEL_MIN / 2))
    _store(fit, verdict.steps, final, state)


def _store(fit: Fit, steps: Tensor, final: Tensor, state: _State) -> None:
    """Store fits. Level 1 or -1 leaves no common divisor, so no larger step is missed."""
    state.on_grid.copy_(final)
    torch.mul(steps, fit.signs, out=state.steps)
    state.levels.copy_(fit.levels.mul_(fit.signs.unsqueeze(1)))


def _suppose_peak_levels(values: Tensor, peaks: Tensor) -> Tensor:
    """Return the level of the peak, fp32 [n], if the smallest non-zero weight has level 1.

    0 where the peak is too many times larger. An all-zero block gets any level.
    """
    # As patterns so that zero becomes the largest: the int32 sum wraps around for all others.
    wrapped = values.view(torch.int32).bitwise_and(PATTERN_MASK).add_(PATTERN_MASK)
    smallest = wrapped.amin(-1).sub_(PATTERN_MASK).view(torch.float32)
    ratios = (peaks / smallest).nan_to_num_(nan=1.0)
    return ratios.round().masked_fill_(ratios > MAX_PEAK_RATIO, 0.0)


def _solve_any(stored: Tensor, state: _State) -> None:
    """Try every peak level; keep the exact fit with the largest step, else the largest step.

    The levels are tried at once on copies of the blocks: a tensor on a grid leaves few blocks for
    this, and a loop over the levels would cost more in calls than in arithmetic.
    """
    num_blocks = len(stored)
    peak_levels = torch.arange(1, 1 - LEVEL_MIN, device=stored.device).repeat_interleave(num_blocks)
    copies = stored.repeat(-LEVEL_MIN, 1)
    values = copies.float()
    extremes = find_extremes(values)
    fit = fit_levels(values, extremes, peak_levels.float(), stored.dtype)
    possible = torch.nonzero(fit.possible()).squeeze(1)
    fit = fit.of(possible)
    verdict = judge(fit, copies[possible])
    # The lowest rank wins: exact fits, then other ones, each from the largest step down.
    ranks = torch.full_like(peak_levels, _NO_FIT)
    ranks[possible] = peak_levels[possible] + _NO_FIT * (~verdict.explained).long()
    ranks[possible] -= -LEVEL_MIN * verdict.exact.long()
    places = torch.zeros_like(ranks)
    places[possible] = torch.arange(len(possible), device=stored.device)
    best, winners = ranks.view(-LEVEL_MIN, num_blocks).min(0)
    at = torch.nonzero(best < _NO_FIT).squeeze(1)
    chosen = places.view(-LEVEL_MIN, num_blocks)[winners[at], at]
    fit = fit.of(chosen)
    state.on_grid.copy_(extremes.peaks[:num_blocks] == 0)
    state.steps.zero_()
    state.levels.zero_()
    state.on_grid[at] = True
    state.steps[at] = verdict.steps[chosen] * fit.signs
    state.levels[at] = fit.levels.mul_(fit.signs.unsqueeze(1)).to(torch.int8)


def _search(stored: Tensor, state: _State) -> None:
    """Give blocks off the grid the step that costs least, and the nearest levels."""
    values = stored.float()
    state.on_grid.zero_()
    state.steps.copy_(best_steps(values))
    state.levels.copy_(nearest_levels(latents(values, state.steps.unsqueeze(1))))
