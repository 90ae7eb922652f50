"""The plot of scores while a model trains: KLD and perplexity over the optimizer steps."""

from collections.abc import Callable, Sequence
from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from qatlora.report.axes import BLUE, GREEN, VERMILION, new_panels, whole_numbers
from qatlora.report.results import REFERENCE, TEACHER
from qatlora.report.results_curve import CurveLevel, CurvePoint, CurveScores

CURVE_PLOT = "curve.png"

_Figure = Callable[[CurveScores], tuple[float, float] | None]
"""A value and its standard error."""

_LEVEL_LINES = {TEACHER: ":", REFERENCE: (0, (6, 3))}


def curve_figure(points: Sequence[CurvePoint], levels: Sequence[CurveLevel]) -> Figure | None:
    """A panel of KLD, where there is a teacher, and one of perplexity; None without points."""
    if not points:
        return None
    panels: list[tuple[str, str, _Figure]] = [
        ("KLD to the teacher, held-out text", "nats per token", _kld),
        ("Perplexity, held-out text", "perplexity", _perplexity),
    ]
    panels = [panel for panel in panels if panel[-1](points[0])]
    figure, axes = new_panels(len(panels))
    for axis, (title, unit, value) in zip(axes, panels, strict=True):
        _draw(axis, points, levels, value)
        axis.set(title=title, xlabel="optimizer step", ylabel=unit)
        axis.xaxis.set_major_locator(whole_numbers())
    # The last panel has every line of the others.
    axes[-1].legend(frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _draw(
    axis: Axes, points: Sequence[CurvePoint], levels: Sequence[CurveLevel], value: _Figure
) -> None:
    texts = list(dict.fromkeys(point.text for point in points))
    styles = cycle(((BLUE, "o"), (VERMILION, "s"), (GREEN, "^")))
    for text, (color, marker) in zip(texts, styles, strict=False):
        drawn = [(p.step, *found) for p in points if p.text == text and (found := value(p))]
        steps, values, errors = (list(column) for column in zip(*drawn, strict=True))
        axis.plot(steps, values, "-", color=color, marker=marker, markersize=4, label=text)
        low = [y - error for y, error in zip(values, errors, strict=True)]
        high = [y + error for y, error in zip(values, errors, strict=True)]
        axis.fill_between(steps, low, high, color=color, alpha=0.1, linewidth=0)
        for level in levels:
            if level.text == text and (found := value(level)):
                axis.axhline(
                    found[0], color=color, linewidth=1.1, linestyle=_LEVEL_LINES[level.model],
                    label=f"{text}: {level.model}",
                )  # fmt: skip


def _kld(scores: CurveScores) -> tuple[float, float] | None:
    if scores.kld_mean is None or scores.kld_stderr is None:
        return None
    return scores.kld_mean, scores.kld_stderr


def _perplexity(scores: CurveScores) -> tuple[float, float]:
    return scores.perplexity, scores.perplexity * scores.nll_stderr
