"""What the recipe inspect leaves."""

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorInspection:
    """One tensor of a checkpoint against the Q4_0 grid.

    Errors are relative: sqrt(sum (decoded - w)^2 / sum w^2).

    Attributes:
        name: the module, without ``.weight``.
        blocks: number of blocks of 32 weights.
        zero_blocks: blocks of zeros alone: on every grid, with no peak level.
        on_grid_share: share of blocks on a grid, zero blocks among them.
        peak_levels: blocks on the grid whose largest level is 1, 2, .. 8.
        reference_exact_share: share of blocks that llama.cpp's reference encoder reproduces.
        error_reference: relative error of that encoder; None where a step overflows fp16.
        error_ours: relative error of recovered, or off the grid searched, steps.
    """

    name: str
    blocks: int
    zero_blocks: int
    on_grid_share: float
    peak_levels: list[int]
    reference_exact_share: float
    error_reference: float | None
    error_ours: float


@dataclass(frozen=True)
class TensorEdit:
    """A tensor that differs between two checkpoints.

    Attributes:
        name: the tensor's name in the files.
        changed_share: share of weights with another value.
        relative_size: sqrt(sum (after - before)^2 / sum before^2); None if all were zero before.
        on_grid_before: share of blocks on a grid; None outside the trained list.
        on_grid_after: the same after the edit.
        blocks_off_grid: blocks that were on a grid before and are not after; None as above.
    """

    name: str
    changed_share: float
    relative_size: float | None
    on_grid_before: float | None = None
    on_grid_after: float | None = None
    blocks_off_grid: int | None = None


@dataclass(frozen=True)
class Comparison:
    """A checkpoint against the one it was made from.

    Attributes:
        against: folder of the checkpoint before the edit.
        tensors: number of tensors that both have.
        edits: those of them that differ, in the order of their names.
        stray: tensors that only the edited checkpoint has.
        missing: tensors that only the one before has.
    """

    against: str
    tensors: int
    edits: list[TensorEdit]
    stray: list[str]
    missing: list[str]


@dataclass(frozen=True)
class InspectResult:
    """Whether a checkpoint's trained list lies on the Q4_0 grid; shares and errors over all of it.

    `kind` is on_grid, partly or off_grid; `stored_types` counts tensors per type in the files.
    """

    kind: str
    on_grid_share: float
    reference_exact_share: float
    error_reference: float | None
    error_ours: float
    stored_types: dict[str, int]
    tensors: list[TensorInspection]
    comparison: Comparison | None = None
