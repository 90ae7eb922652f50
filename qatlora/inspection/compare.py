"""What an edit, a merge or an "abliteration" did to a checkpoint, tensor by tensor.

Every tensor that both checkpoints have is compared by value, so that a file stored anew in a wider
type counts as unchanged. Tensors of the trained list that did change are looked at on the grid
before and after: an edit that does not know the grid takes every block it touches off it.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from qatlora.base.names import weight_key
from qatlora.base.source import Source
from qatlora.errors import CheckpointError
from qatlora.grid import detect
from qatlora.inspection.tensors import OnTensor, finite, naming, refuse_builds, row_parts
from qatlora.report.results_inspect import Comparison, TensorEdit


@dataclass
class _EditSums:
    """Counts and sums of squares over the parts of a tensor; blocks stay 0 outside the list."""

    weights: int = 0
    changed: int = 0
    edit_squares: float = 0.0
    before_squares: float = 0.0
    blocks: int = 0
    on_grid_before: int = 0
    on_grid_after: int = 0
    blocks_off_grid: int = 0


def require_comparable(after: Source, before: Source) -> None:
    """Check from the headers that two checkpoints are of one shape.

    Raises:
        CheckpointError: an NF4 build, another architecture, no common tensor, or another shape.
    """
    refuse_builds(before)
    if after.model_type != before.model_type:
        raise CheckpointError(
            f"{after.folder} is a '{after.model_type}' and {before.folder} a "
            f"'{before.model_type}', and only checkpoints of one architecture can be compared. "
            "Give inspect.against=FOLDER of the checkpoint that this one was made from."
        )
    shapes_after, shapes_before = after.shapes(), before.shapes()
    common = sorted(shapes_after.keys() & shapes_before.keys())
    if not common:
        raise CheckpointError(
            f"{after.folder} and {before.folder} have no tensor name in common (for example "
            f"{min(shapes_after)} and {min(shapes_before)}). One of the two was saved "
            "by another tool or class: save both with the same one."
        )
    other = [name for name in common if shapes_after[name] != shapes_before[name]]
    if other:
        raise CheckpointError(
            f"{len(other)} of {len(common)} tensors have another shape in {after.folder} than in "
            f"{before.folder}: {other[0]} is {shapes_after[other[0]]} against "
            f"{shapes_before[other[0]]}. Give inspect.against=FOLDER of the checkpoint that this "
            "one was made from, with the same vocabulary and layers."
        )


def compare_checkpoints(
    after: Source,
    before: Source,
    trained: Iterable[str],
    device: torch.device,
    on_tensor: OnTensor | None = None,
) -> Comparison:
    """Compare two checkpoints that `require_comparable` has accepted.

    Args:
        after: the edited checkpoint.
        before: the one that it was made from.
        trained: modules, without ``.weight``, whose blocks are looked at on the grid.
        device: where the arithmetic runs.
        on_tensor: called with 1 after each tensor of `after`.
    """
    on_grid_names = set(map(weight_key, trained))
    edits, stray = [], []
    for name in sorted(after.files):
        if name in before.files:
            tensors = before.tensor(name), after.tensor(name)
            edit = compare_tensors(name, *tensors, device, grid=name in on_grid_names)
            edits += [edit] if edit else []
        else:
            stray.append(name)
        if on_tensor:
            on_tensor(1)
    return Comparison(
        against=str(before.folder),
        tensors=len(after.files) - len(stray),
        edits=edits,
        stray=stray,
        missing=sorted(before.files.keys() - after.files.keys()),
    )


def compare_tensors(
    name: str, before: Tensor, after: Tensor, device: torch.device, *, grid: bool
) -> TensorEdit | None:
    """What changed from `before` to `after` (same shape, any types); None if no value did.

    `grid` asks for the shares of blocks on the grid as well.
    """
    if before.dtype == after.dtype and torch.equal(before, after):
        return None
    sums = _EditSums()
    with naming(name):
        for part_before, part_after in _pairs(before, after, device):
            _add_edit(sums, part_before, part_after)
            if grid:
                _add_blocks(sums, part_before, part_after)
    if sums.changed == 0:
        return None
    squares = sums.before_squares
    size = finite(math.sqrt(sums.edit_squares / squares)) if squares else None
    return TensorEdit(
        name=name,
        changed_share=sums.changed / sums.weights,
        relative_size=size,
        on_grid_before=sums.on_grid_before / sums.blocks if grid else None,
        on_grid_after=sums.on_grid_after / sums.blocks if grid else None,
        blocks_off_grid=sums.blocks_off_grid if grid else None,
    )


def _pairs(before: Tensor, after: Tensor, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    for pair in zip(row_parts(before), row_parts(after), strict=True):
        yield pair[0].to(device), pair[1].to(device)


def _add_edit(sums: _EditSums, before: Tensor, after: Tensor) -> None:
    before, after = before.float(), after.float()
    sums.weights += before.numel()
    sums.changed += int((before != after).sum())
    sums.edit_squares += torch.linalg.vector_norm(after - before).item() ** 2
    sums.before_squares += torch.linalg.vector_norm(before).item() ** 2


def _add_blocks(sums: _EditSums, before: Tensor, after: Tensor) -> None:
    on_before, on_after = detect(before), detect(after)
    sums.blocks += on_before.numel()
    sums.on_grid_before += int(on_before.sum())
    sums.on_grid_after += int(on_after.sum())
    sums.blocks_off_grid += int((on_before & ~on_after).sum())
