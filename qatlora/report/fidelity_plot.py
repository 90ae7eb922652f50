"""The plots of a comparison: distribution of the KLD per token, and its course over the window."""

from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

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
from qatlora.report.results_fidelity import FidelityModel, FidelityResult

DISTRIBUTION_PLOT = "kld_distribution.png"
POSITION_PLOT = "kld_by_position.png"

_COLORS = (BLUE, VERMILION, GREEN, PURPLE, AMBER, SKY, BLACK, GREY)
_LINES = ("-", "--", "-.", ":")
_NEARLY_ALL = 0.99  # of the tokens: what lies left of this is not drawn


def distribution_figure(result: FidelityResult | None, edges: Sequence[float]) -> Figure | None:
    """Share of tokens whose KLD is larger than x, both axes logarithmic: the tail is what differs.

    Args:
        result: the comparison.
        edges: of the bins of the histograms; the first one is 0.
    """
    if result is None:
        return None
    figure, axes = new_panels(len(result.models[0].texts), share_axes=True)
    for axis, text in zip(axes, result.models[0].texts, strict=True):
        for model, (color, line) in zip(result.models, _styles(), strict=False):
            figures = model.texts[text]
            shares = _shares_above(figures.histogram)
            num_points = sum(share > 0 for share in shares)  # a logarithm of 0 cannot be drawn
            label = model.name if num_points else f"{model.name}: 0 everywhere"
            drawn = edges[1 : 1 + num_points], shares[:num_points]
            axis.plot(*drawn, line, color=color, label=label)
        axis.set(title=text, xlabel="x, nats", xscale="log", yscale="log")
    axes[0].set_ylabel("share of tokens with KLD > x")
    axes[0].yaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:g} %"))
    axes[0].set_xlim(left=_first_loss(result, edges))
    _legend(axes[-1])
    return figure


def position_figure(result: FidelityResult | None) -> Figure | None:
    """Mean KLD over the position in the window, with bands of one standard error."""
    if result is None:
        return None
    figure, axes = new_panels(len(result.models[0].texts), share_axes=True)
    for axis, text in zip(axes, result.models[0].texts, strict=True):
        for model, (color, line) in zip(result.models, _styles(), strict=False):
            _draw_course(axis, model, text, color, line)
        axis.set(title=text, xlabel="position in the window, tokens")
    axes[0].set_ylim(bottom=0)  # last: it ends the scaling of all panels
    axes[0].set_ylabel("mean KLD, nats per token")
    _legend(axes[-1])
    return figure


def _draw_course(axis: Axes, model: FidelityModel, text: str, color: str, line: str) -> None:
    parts = model.texts[text].by_position
    middles = [(part.start + part.stop) / 2 for part in parts]
    means = [part.mean for part in parts]
    axis.plot(middles, means, line, color=color, marker="o", markersize=3, label=model.name)
    axis.fill_between(
        middles,
        [part.mean - part.stderr for part in parts],
        [part.mean + part.stderr for part in parts],
        color=color,
        alpha=0.15,
        linewidth=0,
    )


def _shares_above(histogram: Sequence[int]) -> list[float]:
    """For the upper edge of each bin, the share of tokens above it."""
    total, seen, shares = sum(histogram), 0, []
    for count in histogram:
        seen += count
        shares.append((total - seen) / total)
    return shares


def _first_loss(result: FidelityResult, edges: Sequence[float]) -> float:
    """The edge up to which, for every model and text with a KLD, nearly all tokens are above."""
    histograms = [text.histogram for model in result.models for text in model.texts.values()]
    curves = [shares for shares in map(_shares_above, histograms) if shares[0] > 0]
    shares = [min(at_edge) for at_edge in zip(*curves, strict=True)]
    whole = [x for x, share in zip(edges[1:], shares, strict=True) if share > _NEARLY_ALL]
    return max(whole, default=edges[1])


def _styles() -> list[tuple[str, str]]:
    """Neighbours differ in both, so that equal curves are seen; enough for a few dozen models."""
    shifts = range(len(_LINES))
    return [
        (color, _LINES[(number + shift) % len(_LINES)])
        for shift in shifts
        for number, color in enumerate(_COLORS)
    ]


def _legend(axis: Axes) -> None:
    axis.legend(frameon=False, fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
