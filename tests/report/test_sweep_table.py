"""The table of a sweep from made-up runs: every figure in it, foreign text disarmed."""

import csv
import io
from dataclasses import replace

import pytest
from rich.console import Console

from qatlora.report.results_sweep import SweepFigures, SweepResult, SweepRun
from qatlora.report.sweep_plot import sweep_figure
from qatlora.report.sweep_table import to_console, to_csv, to_markdown, write_sweep

BASE = SweepFigures(14.9, 0.41, 26.2, 0.29)
NONE = SweepFigures()


def run(number, rank, **changes):
    whole = SweepRun(
        number=number,
        folder=f"runs/x/{number}",
        settings={"adapter.rank": rank, "train.learning_rate": "1e-3"},
        status="finished",
        reason=None,
        seconds=61.5,
        base=BASE,
        final=SweepFigures(9.8123456789, 0.17, 27.6, 0.3),
        gates={"passed": 8, "skipped": 1},
        failed_gates=[],
    )
    return replace(whole, **changes)


@pytest.fixture
def result(tmp_path):
    failed = {"status": "failed", "reason": "drift: 0.31 | *too much*", "failed_gates": ["drift"]}
    gone = {"status": "unfinished", "reason": "killed", "seconds": None, "gates": {}}
    runs = [run(0, "8"), run(1, "16", **failed), run(2, "32", **gone, base=NONE, final=NONE)]
    return SweepResult(str(tmp_path), ["adapter.rank", "train.learning_rate"], runs)


def test_the_csv_holds_every_figure_in_full(result):
    rows = list(csv.DictReader(io.StringIO(to_csv(result))))
    assert [row["adapter.rank"] for row in rows] == ["8", "16", "32"]
    assert float(rows[0]["task_perplexity"]) == 9.8123456789
    assert float(rows[0]["base_general_kld_nats"]) == 0.29
    assert [row["status"] for row in rows] == ["finished", "failed", "unfinished"]
    assert rows[1]["reason"] == "drift: 0.31 | *too much*"
    assert (rows[2]["task_perplexity"], rows[2]["seconds"]) == ("", "")


def test_the_markdown_names_gates_reasons_and_the_plot(result):
    text = to_markdown(result, has_plot=True)
    assert "**1 of 3 runs finished.**" in text
    assert "8 passed, 1 skipped" in text
    assert "failed: drift" in text
    assert "- run 1: drift: 0.31 \\| \\*too much\\*" in text
    assert "1 min 02 s" in text
    assert "sweep.png" in text
    assert "sweep.png" not in to_markdown(result, has_plot=False)


def test_the_markdown_has_a_row_for_the_base_that_all_runs_start_from(result):
    (row,) = (line for line in to_markdown(result, has_plot=True).splitlines() if "| base" in line)
    assert [cell.strip() for cell in row.split("|")][5:9] == ["14.90", "0.4100", "26.20", "0.2900"]
    other = replace(result.runs[0], base=replace(BASE, task_perplexity=15.0))
    both = replace(result, runs=[other, *result.runs])
    assert "| base" not in to_markdown(both, has_plot=True)


def test_eighty_columns_show_every_figure_of_the_terminals_table_whole(result):
    console = Console(file=io.StringIO(), width=80)
    console.print(to_console(result))
    text = console.file.getvalue()
    assert "…" not in text
    assert "9.812" in text
    assert "unfinished" in text


def test_a_sweep_without_figures_has_no_plot_and_leaves_none_behind(result, tmp_path):
    write_sweep(result)
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    bare = [replace(one, base=NONE, final=NONE) for one in result.runs]
    write_sweep(replace(result, runs=bare))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["sweep.csv", "sweep.md"]


def test_the_axis_of_perplexities_has_plain_numbers(result):
    axis, _ = sweep_figure(result).axes
    axis.figure.canvas.draw()
    ticks = axis.get_xticklabels(which="both")
    assert all(not tick.get_text() or float(tick.get_text()) > 0 for tick in ticks)
    assert any(tick.get_text() for tick in ticks)
