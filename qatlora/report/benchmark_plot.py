"""The benchmark's plots: ratios to plain PEFT, and gain on the task against forgetting."""

from itertools import cycle

from matplotlib.figure import Figure

from qatlora.report.axes import (
    AMBER,
    BLACK,
    BLUE,
    GREEN,
    GREY,
    PURPLE,
    SKY,
    VERMILION,
    new_panels,
)
from qatlora.report.results_benchmark import BenchmarkResult

SPEED_PLOT = "speed.png"
FORGETTING_PLOT = "forgetting.png"

_COLORS = (BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY, BLACK)
_MARKERS = "osD^vPX*"


def speed_figure(result: BenchmarkResult | None) -> Figure | None:
    """Bars of time and memory over the baseline's, per size of a step; None without a baseline."""
    if result is None or result.speed is None:
        return None
    rows = [row for row in result.speed.rows if row.time_ratio is not None]
    if not rows:
        return None
    sizes = list(dict.fromkeys(row.tokens_per_step for row in rows))
    methods = list(dict.fromkeys(row.method for row in rows))
    figure, axes = new_panels(2)
    for axis, (what, ratio) in zip(
        axes,
        (("Step time", lambda row: row.time_ratio), ("Peak memory", lambda row: row.memory_ratio)),
        strict=True,
    ):
        height = 0.8 / len(sizes)
        for index, (size, color) in enumerate(zip(sizes, cycle(_COLORS), strict=False)):
            of_size = [row for row in rows if row.tokens_per_step == size]
            places = [methods.index(row.method) + index * height for row in of_size]
            values = [ratio(row) for row in of_size]
            axis.barh(places, values, height * 0.9, color=color, label=f"{size:,} tokens")
        axis.axvline(1, color=GREY, linewidth=1)
        axis.set_yticks([i + 0.4 - height / 2 for i in range(len(methods))], methods)
        axis.invert_yaxis()
        axis.set(title=what, xlabel=f"ratio to {result.speed.baseline}")
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def forgetting_figure(result: BenchmarkResult | None) -> Figure | None:
    """Per run of each method's best rate: KLD on general text over the gain on the task."""
    if result is None or result.adapters is None:
        return None
    figure, (axis,) = new_panels(1)
    styles = zip(cycle(_COLORS), cycle(_MARKERS), strict=False)
    for summary, (color, marker) in zip(result.adapters.summaries, styles, strict=False):
        chosen = [
            run
            for run in result.adapters.runs
            if run.method == summary.method and run.learning_rate == summary.learning_rate
        ]
        losses = [run.judged for run in chosen]
        axis.plot(
            [result.adapters.before.task - each.task for each in losses],
            [each.general_kld for each in losses],
            marker, color=color, markersize=7, label=summary.label,
        )  # fmt: skip
    axis.set(
        title="Gain on the task against forgetting, each seed a point",
        xlabel="gain on the task, nats per token",
        ylabel="KLD from the base on general text, nats per token",
    )
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure
