"""The table of a sweep: `sweep.csv` in full digits, `sweep.md` and `sweep.png` for people."""

import csv
import dataclasses
import io
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from rich.console import Console, RenderableType

from qatlora.files import replacing, write_text
from qatlora.report.console import plain_table
from qatlora.report.escape import code_span, inline, table
from qatlora.report.formatting import MISSING, format_figure, format_seconds
from qatlora.report.results_sweep import SweepFigures, SweepResult, SweepRun
from qatlora.report.sweep_plot import sweep_figure

CSV_NAME, MARKDOWN_NAME, PLOT_NAME = "sweep.csv", "sweep.md", "sweep.png"

_FIGURES = tuple(field.name for field in dataclasses.fields(SweepFigures))
_HEADERS = ("task perplexity", "task KLD", "general perplexity", "general KLD", "gates", "time")


def write_sweep(result: SweepResult) -> None:
    """Write the three files into the sweep's folder; no plot where no run has figures."""
    folder = Path(result.folder)
    write_text(folder / CSV_NAME, to_csv(result))
    figure = sweep_figure(result)
    if figure is None:
        (folder / PLOT_NAME).unlink(missing_ok=True)
    else:
        with replacing(folder / PLOT_NAME) as partial:
            FigureCanvasAgg(figure)
            figure.savefig(partial, format="png")
    write_text(folder / MARKDOWN_NAME, to_markdown(result, has_plot=figure is not None))


def to_csv(result: SweepResult) -> str:
    """A line per run: settings, figures of the base and of the final model, gates, reason."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    base = [f"base_{name}" for name in _FIGURES]
    writer.writerow(
        ["run", *result.differing, "status", *base, *_FIGURES,
         "gates_failed", "seconds", "reason", "folder"]
    )  # fmt: skip
    for run in result.runs:
        writer.writerow(
            [run.number, *run.settings.values(), run.status,
             *dataclasses.astuple(run.base), *dataclasses.astuple(run.final),
             " ".join(run.failed_gates), run.seconds, run.reason, run.folder]
        )  # fmt: skip
    return text.getvalue()


def to_markdown(result: SweepResult, *, has_plot: bool) -> str:
    """The table, the reasons of failed runs, and the plot."""
    header = ("run", *map(inline, result.differing), "status", *_HEADERS)
    align = "r" + "l" * (len(result.differing) + 1) + "rrrrlr"
    rows = [[inline(cell) for cell in _cells(run)] for run in result.runs]
    bases = {run.base for run in result.runs} - {SweepFigures()}
    if len(bases) == 1:  # another storage or base in each run: the CSV has them
        rows.insert(0, ["base", *[""] * (len(result.differing) + 1), *_figures(*bases), "", ""])
    finished = len(result.runs) - result.num_failed
    parts = [
        "# Sweep",
        f"**{finished} of {len(result.runs)} runs finished.** In {code_span(result.folder)}.",
        "Perplexity and mean KLD to the teacher (nats per token) of the file read back, else of "
        "the trained model, on held-out text.",
        table(header, rows, align),
        "\n".join(f"- run {run.number}: {inline(run.reason)}" for run in result.runs if run.reason),
        f"![Figures of all runs]({PLOT_NAME})" if has_plot else "",
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def show(result: SweepResult) -> None:
    """Print the figures that the plot shows, narrow enough for a terminal."""
    console = Console(stderr=True, highlight=False)
    console.print(to_console(result))
    console.print(f"The table is in {Path(result.folder) / MARKDOWN_NAME}.", soft_wrap=True)


def to_console(result: SweepResult) -> RenderableType:
    """A row per run, without what fits only into a file."""
    keys = [key.rpartition(".")[2].replace("_", " ") for key in result.differing]
    header = ("run", *keys, "status", "task PPL", "general KLD", "failed gates", "time")
    rows = []
    for run in result.runs:
        number, *settings, status, perplexity, _, _, kld, _, time = _cells(run)
        failed = ", ".join(run.failed_gates)
        rows.append([number, *settings, status, perplexity, kld, failed, time])
    return plain_table("sweep", header, rows)


def _cells(run: SweepRun) -> list[str]:
    time = MISSING if run.seconds is None else format_seconds(run.seconds)
    return [
        str(run.number),
        *run.settings.values(),
        run.status,
        *_figures(run.final),
        _gates(run),
        time,
    ]


def _figures(figures: SweepFigures) -> list[str]:
    return [format_figure(one, decimals=True) for one in dataclasses.astuple(figures)]


def _gates(run: SweepRun) -> str:
    if run.failed_gates:
        return f"failed: {', '.join(run.failed_gates)}"
    return ", ".join(f"{count} {status}" for status, count in run.gates.items()) or MISSING
