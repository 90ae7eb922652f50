"""The plot of a data preview: how long the conversations are, and where rows end."""

from matplotlib.figure import Figure

from qatlora.report.axes import BLUE, VERMILION, new_panels
from qatlora.report.results_preview import PreviewResult

LENGTHS_PLOT = "lengths.png"


def lengths_figure(result: PreviewResult | None) -> Figure | None:
    """A bar per bin, on a logarithmic axis; None without a preview."""
    if result is None:
        return None
    figure, [axis] = new_panels(1)
    starts = [max(one.first - 1, one.last // 2) for one in result.lengths]  # none begins at 0
    widths = [one.last - start for one, start in zip(result.lengths, starts, strict=True)]
    counts = [one.count for one in result.lengths]
    axis.bar(starts, counts, widths, align="edge", color=BLUE, edgecolor="white")
    label = f"data.max_length_tokens={result.max_length_tokens}"
    axis.axvline(result.max_length_tokens, color=VERMILION, linestyle="--", label=label)
    axis.set_xscale("log", base=2)
    axis.xaxis.set_major_formatter(lambda tokens, _: f"{tokens:.0f}")
    axis.set(title="Lengths of conversations", xlabel="tokens, uncut", ylabel="conversations")
    axis.legend(frameon=False)
    return figure
