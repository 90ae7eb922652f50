"""An inspection in words and tables: what it means first, then tensors by kind, then each one."""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from statistics import fmean

from qatlora.report.changes import layer_and_kind, ordered_kinds
from qatlora.report.escape import inline, table
from qatlora.report.formatting import MISSING, format_count, format_figure, format_share
from qatlora.report.results_inspect import Comparison, InspectResult, TensorEdit, TensorInspection

KIND_HEADER = ("kind", "tensors", "on grid", "peak level", "llama.cpp error", "our error")
_TENSOR_HEADER = ("tensor", "blocks", "on grid", "peak level", "llama.cpp error", "our error")
_EDIT_HEADER = ("tensor", "changed", "size", "on grid before", "after", "blocks off")

_ON_GRID_SHARE = 0.99  # of a tensor's blocks: single odd blocks do not make it an off-grid one
_NAMED = 3  # tensors that a sentence names


@dataclass(frozen=True)
class KindInspection:
    """Tensors of one kind: means of their shares and errors, sums of their blocks."""

    kind: str
    num_tensors: int
    on_grid_share: float
    peak_levels: list[int]
    error_reference: float | None
    error_ours: float


def headline(result: InspectResult) -> str:
    """Is it on a grid? One sentence."""
    share = f"{format_share(result.on_grid_share)} of the trained blocks"
    if result.kind == "on_grid":
        return f"On a Q4_0 grid: {share} are step * level, level in -8..7."
    if result.kind == "off_grid":
        return f"Not on a Q4_0 grid: {share} are; these are ordinary or latent weights."
    off = _off_grid(result)
    return f"Partly on a Q4_0 grid: {share}; {len(off)} of {len(result.tensors)} tensors are off."


def advice(result: InspectResult) -> list[str]:
    """What the figures mean for storage, training and llama-quantize; a sentence or two each."""
    lines = {"on_grid": _if_on_grid, "off_grid": _if_off_grid, "partly": _if_partly}
    sentences = list(lines[result.kind](result))
    if result.comparison:
        sentences += _of_comparison(result.comparison)
    return sentences


def kind_rows(result: InspectResult) -> list[list[str]]:
    """Cells in the order of `KIND_HEADER`, attention first."""
    return [
        [kind.kind, format_count(kind.num_tensors), *_cells(kind)]
        for kind in inspections_by_kind(result)
    ]


def tables(result: InspectResult) -> Iterator[str]:
    """The Markdown tables: by kind, then the comparison, then tensor by tensor."""
    yield (
        "Errors are relative: sqrt(sum (decoded - w)^2 / sum w^2), decoded in the type of the "
        "file; llama.cpp's is that of its reference encoder, which llama-quantize uses without an "
        "importance matrix. Peak level: the commonest largest level of a block on the grid."
    )
    rows = [[inline(cell) for cell in row] for row in kind_rows(result)]
    yield table(KIND_HEADER, rows, "lrrrrr")
    if result.comparison and result.comparison.edits:
        yield f"Changed against {inline(result.comparison.against)}:"
        rows = [_edit_cells(edit) for edit in result.comparison.edits]
        yield table(_EDIT_HEADER, rows, "lrrrrr")
    rows = [
        [inline(tensor.name), format_count(tensor.blocks), *_cells(tensor)]
        for tensor in result.tensors
    ]
    yield table(_TENSOR_HEADER, rows, "lrrrrr")


def inspections_by_kind(result: InspectResult) -> list[KindInspection]:
    """One `KindInspection` per kind of tensor (q, k, v, o, gate, up, down, others)."""
    groups: defaultdict[str, list[TensorInspection]] = defaultdict(list)
    for tensor in result.tensors:
        groups[layer_and_kind(tensor.name)[1]].append(tensor)
    return [_summary(kind, groups[kind]) for kind in ordered_kinds(groups)]


def _summary(kind: str, group: list[TensorInspection]) -> KindInspection:
    references = [t.error_reference for t in group if t.error_reference is not None]
    return KindInspection(
        kind=kind,
        num_tensors=len(group),
        on_grid_share=fmean(tensor.on_grid_share for tensor in group),
        peak_levels=[sum(counts) for counts in zip(*(t.peak_levels for t in group), strict=True)],
        error_reference=fmean(references) if len(references) == len(group) else None,
        error_ours=fmean(tensor.error_ours for tensor in group),
    )


def _cells(part: TensorInspection | KindInspection) -> list[str]:
    most = max(part.peak_levels)
    return [
        format_share(part.on_grid_share),
        str(part.peak_levels.index(most) + 1) if most else MISSING,
        format_share(part.error_reference),
        format_share(part.error_ours),
    ]


def _edit_cells(edit: TensorEdit) -> list[str]:
    blocks = edit.blocks_off_grid
    return [
        inline(edit.name),
        format_share(edit.changed_share),
        format_share(edit.relative_size),
        format_share(edit.on_grid_before),
        format_share(edit.on_grid_after),
        MISSING if blocks is None else format_count(blocks),
    ]


def _if_on_grid(result: InspectResult) -> Iterator[str]:
    yield (
        "storage=q4_0 (4.5 bits per weight) holds it exactly, and a zero adapter is this very "
        "model in the GGUF."
    )
    kept = result.reference_exact_share
    if kept >= _ON_GRID_SHARE:
        yield f"llama-quantize to Q4_0 would keep {format_share(kept)} of the blocks exactly."
    else:
        yield (
            f"llama-quantize to Q4_0 would keep only {format_share(kept)} of the blocks exactly "
            f"and move the weights by {_error(result.error_reference)}, because it takes the step "
            "from a block's peak alone, as if that were level 8. qatlora writes the steps that it "
            f"found ({_error(result.error_ours)})."
        )


def _if_off_grid(result: InspectResult) -> Iterator[str]:
    yield (
        "Any Q4_0 file rounds it: llama-quantize moves the weights by "
        f"{_error(result.error_reference)}, searched steps by {_error(result.error_ours)}."
    )
    yield (
        "storage=nf4 or bf16 keeps the fraction of every level, which an adapter is rounded "
        "together with; storage=q4_0 rounds the base before training; recipe=qat_distill trains it "
        "onto a grid."
    )


def _if_partly(result: InspectResult) -> Iterator[str]:
    off = _off_grid(result)
    yield (
        f"Off the grid: {_listed([tensor.name for tensor in off])}. An edit, a merge or a "
        "conversion took them off, or they never were on it; inspect.against=FOLDER of the "
        "original tells which."
    )
    yield (
        "What is on the grid is kept exactly by storage=q4_0; the rest it rounds with searched "
        f"steps. Over all, that is {_error(result.error_ours)}, and llama-quantize "
        f"{_error(result.error_reference)}."
    )


def _of_comparison(comparison: Comparison) -> Iterator[str]:
    edits = comparison.edits
    if not edits:
        yield f"No value differs from {comparison.against} in {comparison.tensors} tensors."
    else:
        yield (
            f"Against {comparison.against}, {len(edits)} of {comparison.tensors} tensors changed: "
            f"{_listed([edit.name for edit in edits])}."
        )
    off = [edit for edit in edits if edit.blocks_off_grid]
    if off:
        blocks = sum(edit.blocks_off_grid or 0 for edit in off)
        yield (
            f"The edit took {format_count(blocks)} blocks of {len(off)} tensors off the grid; a "
            "Q4_0 file rounds these anew."
        )
    elif any(edit.on_grid_before for edit in edits):
        yield "The edit took no block off the grid."
    if comparison.stray:
        yield f"Only here: {_listed(comparison.stray)}.{_about_head(comparison.stray)}"
    if comparison.missing:
        yield f"Missing here: {_listed(comparison.missing)}.{_about_head(comparison.missing)}"


def _about_head(names: list[str]) -> str:
    """lm_head decides whether a model's output matrix is its embeddings."""
    if not any(name.endswith("lm_head.weight") for name in names):
        return ""
    return (
        " Where the embeddings are tied, a stored lm_head.weight is a copy that an edit may have "
        "left behind, and llama.cpp's converter unties the model by it."
    )


def _off_grid(result: InspectResult) -> list[TensorInspection]:
    return [tensor for tensor in result.tensors if tensor.on_grid_share < _ON_GRID_SHARE]


def _listed(names: list[str]) -> str:
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")


def _error(error: float | None) -> str:
    return "more than fp16 holds" if error is None else f"{format_figure(100 * error)} %"
