"""The plot of a sweep: what each run learned, and what it forgot."""

from collections.abc import Callable

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qatlora.report.axes import BLUE, GREY, VERMILION, new_panels
from qatlora.report.results_sweep import SweepFigures, SweepResult, SweepRun

_MAX_LABEL_CHARACTERS = 40


def sweep_figure(result: SweepResult) -> Figure | None:
    """A dot per run in two panels, the base as a bar beside it; None where no run has figures."""
    panels: list[tuple[str, Callable[[SweepFigures], float | None]]] = [
        ("Perplexity on the task", lambda one: one.task_perplexity),
        ("KLD to the teacher on general text", lambda one: one.general_kld_nats),
    ]
    shown = [
        (title, figure)
        for title, figure in panels
        if any(figure(run.final) is not None for run in result.runs)
    ]
    if not shown:
        return None
    panel, axes = new_panels(len(shown))
    panel.set_figheight(max(panel.get_figheight(), 1.2 + 0.35 * len(result.runs)))
    for axis, (title, figure) in zip(axes, shown, strict=True):
        _draw(axis, title, figure, result.runs)
    for axis in axes[1:]:
        axis.tick_params(labelleft=False)
    known = {
        label: handle
        for axis in axes
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
    }
    panel.legend(
        list(known.values()), list(known), loc="outside lower center", ncols=3, frameon=False
    )
    return panel


def _draw(
    axis: Axes,
    title: str,
    figure: Callable[[SweepFigures], float | None],
    runs: list[SweepRun],
) -> None:
    series = (
        ("base", GREY, "|", [figure(run.base) for run in runs]),
        ("finished", BLUE, "o", [figure(run.final) if not run.reason else None for run in runs]),
        ("failed", VERMILION, "X", [figure(run.final) if run.reason else None for run in runs]),
    )
    for label, color, marker, values in series:
        points = [(value, row) for row, value in enumerate(values) if value is not None]
        if points:
            axis.scatter(*zip(*points, strict=True), color=color, marker=marker, s=60, label=label)
    axis.set_yticks(range(len(runs)), [_label(run) for run in runs])
    axis.set_ylim(len(runs) - 0.5, -0.5)
    if "KLD" in title:
        axis.set_xlabel("nats per token")
    else:
        axis.set(xlabel="perplexity", xscale="log")  # a trained run may have a hundredth
        axis.xaxis.set_major_formatter(_plain_number)
        axis.xaxis.set_minor_formatter(_plain_number)
    axis.set_title(title)


def _plain_number(value: float, _: int) -> str:
    """120 where a logarithmic axis would write a power of ten, too wide for ticks that are near."""
    return f"{value:g}"


def _label(run: SweepRun) -> str:
    changed = ", ".join(f"{key.rpartition('.')[2]}={value}" for key, value in run.settings.items())
    text = f"{run.number}: {changed}" if changed else str(run.number)
    too_long = len(text) > _MAX_LABEL_CHARACTERS
    return text[: _MAX_LABEL_CHARACTERS - 3] + "..." if too_long else text
