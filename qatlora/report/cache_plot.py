"""The plot of a teacher cache: divergence lost, and size, over the number of words kept."""

from itertools import cycle

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter, ScalarFormatter

from qatlora.report.axes import BLUE, GREEN, GREY, VERMILION, new_panels
from qatlora.report.results_cache import CachePoint, CacheResult

CACHE_PLOT = "teacher_cache.png"
_FLOOR_NATS = 1e-6  # below it lie float16 and rounding


def cache_figure(result: CacheResult | None) -> Figure | None:
    """Two panels; None without points."""
    if result is None or not result.points:
        return None
    texts: dict[str, list[CachePoint]] = {}
    for point in result.points:
        texts.setdefault(point.text, []).append(point)
    figure, (left, right) = new_panels(2)
    styles = cycle(((BLUE, "o", "-"), (VERMILION, "s", "--"), (GREEN, "^", ":")))
    for (text, points), (color, marker, line) in zip(texts.items(), styles, strict=False):
        top_ks = [point.top_k for point in points]
        lost = [max(point.full - point.kept, _FLOOR_NATS) for point in points]
        left.plot(top_ks, lost, line, color=color, marker=marker, label=f"{text}: lost")
        left.axhline(points[0].full, color=color, linewidth=0.9, label=f"{text}: in full")
    left.set_yscale("log")
    left.set(title="Divergence lost", ylabel="nats per token")
    left.legend(frameon=False, fontsize="small")
    points = next(iter(texts.values()))
    sizes = [point.bytes_per_million_tokens / 1e6 for point in points]
    right.plot([point.top_k for point in points], sizes, "-", color=GREY, marker="o")
    right.axvline(result.top_k, color=BLUE, linewidth=0.9, label=f"this cache: {result.top_k}")
    right.set(title="Size", ylabel="MB per million tokens")
    right.set_ylim(bottom=0)
    right.legend(frameon=False, fontsize="small")
    for axis in (left, right):
        _mark_top_k(axis, [point.top_k for point in points])
    return figure


def _mark_top_k(axis: Axes, top_ks: list[int]) -> None:
    axis.set_xscale("log", base=2)
    axis.set_xticks(top_ks)
    axis.xaxis.set_major_formatter(ScalarFormatter())
    axis.xaxis.set_minor_formatter(NullFormatter())
    axis.set_xlabel("words kept per token")
