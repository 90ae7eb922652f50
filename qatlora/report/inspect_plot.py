"""The plot of an inspection: share on the grid and errors by layer, and the peak levels."""

from collections import defaultdict
from itertools import cycle
from statistics import fmean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qatlora.report.axes import (
    BLUE,
    GREY,
    KIND_STYLES,
    OTHER_STYLES,
    VERMILION,
    new_panels,
    whole_numbers,
)
from qatlora.report.changes import layer_and_kind, ordered_kinds
from qatlora.report.results_inspect import InspectResult, TensorInspection

INSPECT_PLOT = "inspect.png"


def inspect_figure(result: InspectResult | None) -> Figure | None:
    """Three panels (two where no block has a peak level on a grid); None without layers."""
    if result is None:
        return None
    layers: defaultdict[int, list[TensorInspection]] = defaultdict(list)
    for tensor in result.tensors:
        layer = layer_and_kind(tensor.name)[0]
        if layer is not None:
            layers[layer].append(tensor)
    if not layers:
        return None
    peaks = [sum(counts) for counts in zip(*(t.peak_levels for t in result.tensors), strict=True)]
    figure, axes = new_panels(3 if any(peaks) else 2)
    _draw_shares(axes[0], dict(sorted(layers.items())))
    _draw_errors(axes[1], dict(sorted(layers.items())))
    if any(peaks):
        _draw_peaks(axes[2], peaks)
    return figure


def _draw_shares(axis: Axes, layers: dict[int, list[TensorInspection]]) -> None:
    by_kind: defaultdict[str, list[tuple[int, float]]] = defaultdict(list)
    for layer, tensors in layers.items():
        for tensor in tensors:
            by_kind[layer_and_kind(tensor.name)[1]].append((layer, tensor.on_grid_share))
    others = cycle(OTHER_STYLES)
    for kind in ordered_kinds(by_kind):
        color, marker = KIND_STYLES.get(kind) or next(others)
        axis.plot(
            *zip(*by_kind[kind], strict=True), color=color, marker=marker, markersize=4,
            linewidth=1.2, label=kind,
        )  # fmt: skip
    axis.set(title="Blocks on the grid, by layer", xlabel="layer", ylabel="share of blocks")
    axis.set_ylim(-0.03, 1.03)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(whole_numbers())
    axis.legend(frameon=False, fontsize="small", ncols=2)


def _draw_errors(axis: Axes, layers: dict[int, list[TensorInspection]]) -> None:
    """Means over a layer's tensors."""
    known = {
        layer: [tensor.error_reference for tensor in tensors]
        for layer, tensors in layers.items()
        if all(tensor.error_reference is not None for tensor in tensors)
    }
    means = [fmean(error for error in errors if error is not None) for errors in known.values()]
    ours = [fmean(tensor.error_ours for tensor in tensors) for tensors in layers.values()]
    axis.plot(list(known), means, "--", color=VERMILION, marker="s", markersize=4,
              label="llama.cpp reference")  # fmt: skip
    axis.plot(list(layers), ours, "-", color=BLUE, marker="o", markersize=4, label="ours")
    axis.set(title="Relative error in Q4_0, by layer", xlabel="layer", ylabel="relative error")
    axis.set_ylim(bottom=0)
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.xaxis.set_major_locator(whole_numbers())
    axis.legend(frameon=False)


def _draw_peaks(axis: Axes, peaks: list[int]) -> None:
    levels = range(1, len(peaks) + 1)
    axis.bar(list(levels), [count / sum(peaks) for count in peaks], color=GREY)
    axis.set(title="Peak levels of blocks on the grid", xlabel="largest |level| of a block")
    axis.set_ylabel("share of blocks")
    axis.yaxis.set_major_formatter(PercentFormatter(1.0))
    axis.set_xticks(list(levels))
