"""The report's plots as PNG files: loss, distribution of per-token KLD, changes per layer."""

from collections.abc import Callable, Iterator, Sequence
from itertools import cycle
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from qatlora.files import replacing
from qatlora.report.axes import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    KIND_STYLES,
    OTHER_STYLES,
    PURPLE,
    VERMILION,
    new_panels,
    whole_numbers,
)
from qatlora.report.benchmark_plot import (
    FORGETTING_PLOT,
    SPEED_PLOT,
    forgetting_figure,
    speed_figure,
)
from qatlora.report.cache_plot import CACHE_PLOT, cache_figure
from qatlora.report.changes import KindChange, changes_by_kind
from qatlora.report.curve_plot import CURVE_PLOT, curve_figure
from qatlora.report.fidelity_plot import (
    DISTRIBUTION_PLOT,
    POSITION_PLOT,
    distribution_figure,
    position_figure,
)
from qatlora.report.inspect_plot import INSPECT_PLOT, inspect_figure
from qatlora.report.preview_plot import LENGTHS_PLOT, lengths_figure
from qatlora.report.results import KLD_BIN_EDGES, MODELS, RunReport, TextResult, TrainPoint

LOSS_PLOT = "loss.png"
KLD_PLOT = "kld_histogram.png"
CHANGES_PLOT = "changes.png"

# Merged is dashed and drawn last: where it equals trained, both stay visible.
_MODEL_STYLES: dict[str, dict[str, Any]] = {
    "base": {"color": GREY, "linewidth": 1.6, "fill": True, "facecolor": "#6F6F6F33"},
    "trained": {"color": BLUE, "linewidth": 3.2, "alpha": 0.55},
    "merged": {"color": VERMILION, "linewidth": 1.5, "linestyle": (0, (4, 2))},
}
_FEW_POINTS = 12  # below this, points are marked
_SMOOTHED_FROM = 30  # from this on, a running mean is drawn over the steps


def write_plots(report: RunReport, run_dir: Path) -> list[str]:
    """Write the plots that `report` has figures for into `run_dir`, each file whole or not at all.

    A plot of the same name that this report has no figures for is removed, so that none of an
    earlier run is left beside it.

    Returns:
        Names of the files written.
    """
    figures = {
        LOSS_PLOT: loss_figure(report.train.history if report.train else []),
        CURVE_PLOT: curve_figure(report.train.curve if report.train else [], report.curve_levels),
        KLD_PLOT: kld_figure(report.texts),
        CHANGES_PLOT: changes_figure(changes_by_kind(report.changes)),
        INSPECT_PLOT: inspect_figure(report.inspect),
        LENGTHS_PLOT: lengths_figure(report.preview),
        SPEED_PLOT: speed_figure(report.benchmark),
        FORGETTING_PLOT: forgetting_figure(report.benchmark),
        CACHE_PLOT: cache_figure(report.teacher_cache),
        DISTRIBUTION_PLOT: distribution_figure(report.fidelity, KLD_BIN_EDGES),
        POSITION_PLOT: position_figure(report.fidelity),
    }
    for name, figure in figures.items():
        if figure is None:
            (run_dir / name).unlink(missing_ok=True)
            continue
        with replacing(run_dir / name) as partial:
            FigureCanvasAgg(figure)
            figure.savefig(partial, format="png")
    return [name for name, figure in figures.items() if figure is not None]


def loss_figure(history: Sequence[TrainPoint]) -> Figure | None:
    """Loss and cross-entropy over the steps, and in a second panel the KL terms; None if empty."""
    series: list[list[tuple[str, str, str, Callable[[TrainPoint], float | None]]]] = [
        [
            ("total loss", BLACK, "-", lambda point: point.loss),
            ("cross-entropy", BLUE, "--", lambda point: point.ce),
        ],
        [
            ("KL, task tokens", VERMILION, "-", lambda point: point.kl),
            ("KL, general text", GREEN, "--", lambda point: point.general_kl),
        ],
    ]
    panels = [
        [
            (label, color, style, points)
            for label, color, style, value in panel
            if (points := [(p.step, y) for p in history if (y := value(p)) is not None])
        ]
        for panel in series
    ]
    panels = [panel for panel in panels if panel]
    if not panels:
        return None
    figure, axes = new_panels(len(panels))
    for axis, panel, title in zip(
        axes, panels, ("Training loss", "KL to the teacher"), strict=False
    ):
        for label, color, style, points in panel:
            _draw_course(axis, points, label, color, style)
        axis.set(title=title, xlabel="optimizer step", ylabel="nats per token")
        axis.xaxis.set_major_locator(whole_numbers())
        axis.legend(frameon=False)
    return figure


def kld_figure(texts: dict[str, dict[str, TextResult]]) -> Figure | None:
    """Per-token KLD to the teacher, one panel per text, one line per model; None without counts."""
    panels = {
        text: {
            model: result
            for model, result in sorted(results.items(), key=lambda item: _model_rank(item[0]))
            if result.kld_histogram and sum(result.kld_histogram)
        }
        for text, results in texts.items()
    }
    panels = {text: results for text, results in panels.items() if results}
    if not panels:
        return None
    figure, axes = new_panels(len(panels), share_axes=True)
    # The first bin starts at 0, which a log axis cannot show: it is drawn as wide as the second.
    edges = [KLD_BIN_EDGES[1] ** 2 / KLD_BIN_EDGES[2], *KLD_BIN_EDGES[1:]]
    for axis, (text, results) in zip(axes, panels.items(), strict=True):
        others = cycle((GREEN, PURPLE, AMBER))
        for model, result in results.items():
            style = _MODEL_STYLES.get(model) or {"color": next(others), "linewidth": 1.6}
            counts = result.kld_histogram or []
            shares = [count / sum(counts) for count in counts]
            color, rest = style["color"], {k: v for k, v in style.items() if k != "color"}
            axis.stairs(shares, edges, edgecolor=color, label=_kld_label(model, result), **rest)
        axis.set(
            title=f"Per-token KLD to the teacher, {text} text",
            xlabel="KLD in nats",
            ylabel="share of tokens",
            xscale="log",
        )
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.legend(frameon=False, loc="upper left", fontsize="small")
    _fit_to_bins(axes[0], edges, panels)
    return figure


def changes_figure(kinds: Sequence[KindChange]) -> Figure | None:
    """Share of codes and of steps changed over the layers, one line per kind; None without layers.

    A panel whose shares are all zero is left out, unless both are: then the codes' shows it.
    """
    kinds = [kind for kind in kinds if kind.by_layer]
    if not kinds:
        return None
    any_steps = any(kind.steps_max for kind in kinds)
    any_codes = any(kind.codes_max for kind in kinds)
    shown = [("codes", 0)] if any_codes or not any_steps else []
    if any_steps:
        shown.append(("steps", 1))
    figure, axes = new_panels(len(shown))
    for axis, (what, column) in zip(axes, shown, strict=True):
        others = cycle(OTHER_STYLES)
        for kind in kinds:
            color, marker = KIND_STYLES.get(kind.kind) or next(others)
            shares = [layer[column] for layer in kind.by_layer.values()]
            axis.plot(
                list(kind.by_layer), shares, color=color, marker=marker, markersize=4,
                linewidth=1.2, label=kind.kind,
            )  # fmt: skip
        axis.set(title=f"{what.capitalize()} changed, by layer", xlabel="layer")
        axis.set_ylabel(f"share of {what} changed")
        axis.set_ylim(bottom=0, top=None if any_codes or any_steps else 1)
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.xaxis.set_major_locator(whole_numbers())
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw_course(
    axis: Axes, points: Sequence[tuple[int, float]], label: str, color: str, style: str
) -> None:
    steps, values = [step for step, _ in points], [value for _, value in points]
    marker = "o" if len(points) <= _FEW_POINTS else None
    if len(points) < _SMOOTHED_FROM:
        axis.plot(steps, values, style, color=color, marker=marker, linewidth=1.8, label=label)
        return
    width = max(5, len(points) // 12)
    axis.plot(steps, values, "-", color=color, linewidth=0.8, alpha=0.3)
    axis.plot(
        steps, list(_running_mean(values, width)), style, color=color, linewidth=2,
        label=f"{label}, {width}-step mean",
    )  # fmt: skip


def _running_mean(values: Sequence[float], width: int) -> Iterator[float]:
    """Mean over the window around each value; the window is cut off at both ends."""
    half = width // 2
    for index in range(len(values)):
        window = values[max(0, index - half) : index + half + 1]
        yield sum(window) / len(window)


def _kld_label(model: str, result: TextResult) -> str:
    if result.kld is None:
        return model
    mean, median = (f"{value:.3g}" for value in (result.kld.mean, result.kld.median))
    return f"{model} (mean {mean}, median {median})"


def _model_rank(model: str) -> tuple[int, str]:
    return (MODELS.index(model) if model in MODELS else len(MODELS)), model


def _fit_to_bins(
    axis: Axes, edges: Sequence[float], panels: dict[str, dict[str, TextResult]]
) -> None:
    """Cut the shared axes to the bins that hold tokens; room above for the legend."""
    counts = [r.kld_histogram or [] for results in panels.values() for r in results.values()]
    used = [index for index in range(len(edges) - 1) if any(row[index] for row in counts)]
    axis.set_xlim(edges[used[0]], edges[used[-1] + 1])
    if used[0] == 0:
        for each in axis.figure.axes:
            each.set_xlabel("KLD in nats (leftmost bin: all below 0.000001)")
    highest = max(count / sum(row) for row in counts for count in row)
    axis.set_ylim(0, highest * 1.35)
