"""How a checkpoint's tensors lie to the Q4_0 grid, streamed: one tensor is in memory at a time.

Every tensor of the trained list is read from its file, recovered (`qatlora.grid.recover`) and
encoded as llama.cpp's reference does. Decoded values are compared in the type of the file, so a
block that its step explains exactly has no error.
"""

import contextlib
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from qatlora.base.grids import ON_GRID_SHARE
from qatlora.base.names import weight_key
from qatlora.base.source import Source
from qatlora.errors import CheckpointError, GridError
from qatlora.grid import BLOCK_SIZE, Q4Blocks, decode, encode_reference, recover
from qatlora.report.results_inspect import InspectResult, TensorInspection

# A tensor is handled in parts of whole rows: large enough for several threads, and small enough
# that the allocator hands out the same few buffers again instead of fresh pages.
_PART_WEIGHTS = 1 << 20
_NUM_PEAK_LEVELS = 8

OnTensor = Callable[[int], None]


@dataclass
class _Sums:
    """Counts of blocks and sums of squares over weights; shares and errors are made from them."""

    blocks: int = 0
    zero_blocks: int = 0
    on_grid: int = 0
    reference_exact: int = 0
    peak_levels: list[int] = field(default_factory=lambda: [0] * _NUM_PEAK_LEVELS)
    weight_squares: float = 0.0
    reference_squares: float = 0.0
    our_squares: float = 0.0

    def add(self, other: "_Sums") -> None:
        self.blocks += other.blocks
        self.zero_blocks += other.zero_blocks
        self.on_grid += other.on_grid
        self.reference_exact += other.reference_exact
        counts = zip(self.peak_levels, other.peak_levels, strict=True)
        self.peak_levels = [mine + theirs for mine, theirs in counts]
        self.weight_squares += other.weight_squares
        self.reference_squares += other.reference_squares
        self.our_squares += other.our_squares

    def share(self, count: int) -> float:
        return count / self.blocks

    def relative_error(self, squares: float) -> float:
        return math.sqrt(squares / self.weight_squares) if self.weight_squares else 0.0


def refuse_builds(source: Source) -> None:
    """Refuse a build: NF4 has thrown any grid away, and packed Q4_0 is on one by construction.

    Raises:
        CheckpointError: the checkpoint is one.
    """
    if source.packed_modules and source.record is not None:
        raise CheckpointError(
            f"{source.folder} is a packed Q4_0 build, on a grid by construction; of its source "
            f"{source.record.source_name} {source.record.on_grid_share:.2%} of the blocks were, by "
            "its grid.json. Inspect that bf16 checkpoint."
        )
    if source.nf4_modules:
        raise CheckpointError(
            f"{source.folder} stores {len(source.nf4_modules)} modules as NF4, and NF4 keeps no "
            "Q4_0 grid, so there is nothing to look for. Inspect the bf16 checkpoint that it was "
            "made from."
        )


def require_weights(source: Source, names: Iterable[str]) -> None:
    """Check from the headers that the named modules can be inspected.

    Raises:
        CheckpointError: an NF4 build, or a weight is missing.
    """
    refuse_builds(source)
    missing = [name for name in names if weight_key(name) not in source.files]
    if missing:
        raise CheckpointError(
            f"{source.folder} has no tensor '{weight_key(missing[0])}', nor {len(missing) - 1} "
            "others that its config.json calls for. The folder is incomplete, or stored in a "
            "packed form (GPTQ, AWQ): give the bf16 checkpoint."
        )


def inspect_checkpoint(
    source: Source,
    names: Iterable[str],
    device: torch.device,
    on_tensor: OnTensor | None = None,
) -> InspectResult:
    """Inspect the named modules of a checkpoint.

    Args:
        source: a checked folder, not an NF4 build.
        names: modules, without ``.weight``.
        device: where the arithmetic runs.
        on_tensor: called with 1 after each tensor.

    Raises:
        CheckpointError: a tensor is missing or empty.
        GridError: a weight is not finite, or a width is no multiple of 32.
    """
    whole, tensors, types = _Sums(), [], Counter[str]()
    for name in names:
        weight = source.tensor(weight_key(name))
        sums = _sums_of(name, weight, device)
        whole.add(sums)
        tensors.append(_inspection(name, sums))
        types[str(weight.dtype).removeprefix("torch.")] += 1
        if on_tensor:
            on_tensor(1)
    share = whole.share(whole.on_grid)
    return InspectResult(
        kind=_kind(share),
        on_grid_share=share,
        reference_exact_share=whole.share(whole.reference_exact),
        error_reference=finite(whole.relative_error(whole.reference_squares)),
        error_ours=whole.relative_error(whole.our_squares),
        stored_types=dict(types),
        tensors=tensors,
    )


def inspect_tensor(
    name: str, weight: Tensor, device: torch.device | None = None
) -> TensorInspection:
    """Inspect one weight [..., in] as stored (bf16, fp16 or fp32).

    Raises:
        CheckpointError: the weight is empty.
        GridError: a weight is not finite, or ``in`` is no multiple of 32.
    """
    return _inspection(name, _sums_of(name, weight, device or weight.device))


@contextlib.contextmanager
def naming(name: str) -> Iterator[None]:
    """Put a tensor's name before the message of a `GridError`."""
    try:
        yield
    except GridError as problem:
        raise GridError(f"{name}: {problem}") from problem


def finite(figure: float) -> float | None:
    """The figure, or None where arithmetic has overflowed: a report holds finite figures only."""
    return figure if math.isfinite(figure) else None


def row_parts(weight: Tensor) -> tuple[Tensor, ...]:
    """Split a weight [..., in] into parts [rows, in], which bound the memory of temporaries."""
    rows = weight.reshape(-1, weight.shape[-1]) if weight.ndim else weight.reshape(1, 1)
    return rows.split(max(1, _PART_WEIGHTS // max(1, rows.shape[-1])))


def _sums_of(name: str, weight: Tensor, device: torch.device) -> _Sums:
    if weight.numel() == 0:
        raise CheckpointError(
            f"{name} is empty (shape {tuple(weight.shape)}), so the checkpoint is damaged. "
            "Download or convert it again."
        )
    sums = _Sums()
    with naming(name):
        for part in row_parts(weight):
            sums.add(_sums_of_part(part.to(device)))
    return sums


def _sums_of_part(weight: Tensor) -> _Sums:
    """The sums of weights [rows, in]."""
    blocks, on_grid = recover(weight)
    values = weight.float()
    of_reference = _residuals(encode_reference(weight), weight.dtype, values)
    levels = blocks.levels.view(-1, BLOCK_SIZE)
    peaks = torch.maximum(levels.amax(-1), -levels.amin(-1))
    counts = torch.bincount(peaks[on_grid.flatten()], minlength=_NUM_PEAK_LEVELS + 1)
    zero_blocks, *peak_levels = counts.tolist()
    return _Sums(
        blocks=on_grid.numel(),
        zero_blocks=zero_blocks,
        on_grid=int(on_grid.sum()),
        reference_exact=int((of_reference.view(-1, BLOCK_SIZE).abs().amax(-1) == 0).sum()),
        peak_levels=peak_levels,
        weight_squares=_squares(values),
        reference_squares=_squares(of_reference),
        our_squares=_squares(_residuals(blocks, weight.dtype, values)),
    )


def _residuals(blocks: Q4Blocks, stored: torch.dtype, values: Tensor) -> Tensor:
    """Decoded as the file stores it, less the stored values; fp32 [rows, in]."""
    return decode(blocks, stored).float().sub_(values)


def _squares(values: Tensor) -> float:
    """Sum of squares; the norm's own accumulator is wide enough for a part."""
    return torch.linalg.vector_norm(values).item() ** 2


def _inspection(name: str, sums: _Sums) -> TensorInspection:
    return TensorInspection(
        name=name,
        blocks=sums.blocks,
        zero_blocks=sums.zero_blocks,
        on_grid_share=sums.share(sums.on_grid),
        peak_levels=sums.peak_levels,
        reference_exact_share=sums.share(sums.reference_exact),
        error_reference=finite(sums.relative_error(sums.reference_squares)),
        error_ours=sums.relative_error(sums.our_squares),
    )


def _kind(share: float) -> str:
    if share >= ON_GRID_SHARE:
        return "on_grid"
    return "off_grid" if share <= 1 - ON_GRID_SHARE else "partly"
