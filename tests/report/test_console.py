import io
from dataclasses import replace

from rich.console import Console

from qatlora.report.console import to_console
from qatlora.report.results import GuardResult
from qatlora.report.results_benchmark import (
    AdaptersResult,
    BenchmarkResult,
    Losses,
    MethodSummary,
    Spread,
)
from qatlora.report.results_runtime import (
    CANDIDATE,
    CONTROL,
    TRAINED_FP32,
    RuntimeKld,
    RuntimeResult,
    RuntimeRow,
)


def printed(report, width=80):
    console = Console(file=io.StringIO(), width=width)
    console.print(to_console(report))
    return console.file.getvalue()


def test_eighty_columns_show_every_figure_whole(run_report):
    text = printed(run_report)
    assert "…" not in text
    assert "9.812 ± 0.21" in text
    assert "91.35 %" in text
    assert run_report.export.sha256 in text
    assert "Guard passed; published." in text


def test_eighty_columns_hold_the_reference_of_a_distillation(run_report):
    models = {"reference": run_report.texts["general"]["base"]} | run_report.texts["general"]
    text = printed(replace(run_report, texts={"general": models}))
    assert "reference" in text
    assert "…" not in text


def test_eighty_columns_break_no_cell_of_the_runs_in_llama_cpp(run_report):
    def row(model, kld, perplexity=26.15):
        figures = kld and RuntimeKld(kld, 0.00016, kld, kld, kld, 0.9738)
        return RuntimeRow(model, perplexity, 4.2, figures, RuntimeKld(0.3724, 0.023, 0, 0, 0, 0.7))

    rows = [row(TRAINED_FP32, None), row(CANDIDATE, 0.002043), row(CONTROL, 0.02914)]
    text = printed(replace(run_report, runtime=RuntimeResult(3, 256, 381, rows)))
    assert CONTROL in text
    assert "0.002043 ± 0.00016" in text
    assert "0.3724 ± 0.023" in text


def test_eighty_columns_break_no_cell_of_a_comparison_of_adapters(bare_report):
    spread = Spread(2.1284, 2.1176, 2.1315)
    share = Spread(1.013, 1.002, 1.02)
    summary = MethodSummary(
        "reference_q4_0", "a long name", 2e-3, 3, spread, spread, spread, share, share,
        Spread(0.0498, 0.04, 0.05), spread, 4_884_480, Spread(188.0, 170.0, 190.0),
    )  # fmt: skip
    before = Losses(2.5826, 2.5, 3.238, 0.0)
    result = AdaptersResult(None, "tiny", 60, 512, before, [summary], [], [])
    text = printed(replace(bare_report, benchmark=BenchmarkResult(adapters=result)))
    (line,) = (line for line in text.splitlines() if "reference_q4_0" in line)
    cells = ["reference_q4_0", "0.002", "2.1284", "101", "%", "2.1284", "2.1284", "4.98", "%"]
    assert line.split() == [*cells, "4.88", "M"]


def test_a_failed_guard_shows_gate_and_remedy(failed_report):
    text = printed(failed_report)
    assert "Guard failed (drift); nothing was published." in text
    assert "lower train.learning_rate" in text


def test_a_report_of_few_parts_is_printed_as_well(bare_report):
    assert printed(bare_report).strip() == "No guard in this recipe; nothing was published."


def test_text_that_looks_like_console_markup_is_shown_as_it_is(run_report):
    gates = [replace(gate, name="[red]x[/]") for gate in run_report.guard.gates]
    export = replace(run_report.export, path="[bold]a[/bold]\x1b[31m.gguf")
    text = printed(replace(run_report, guard=GuardResult(True, gates), export=export))
    assert "[red]x[/]" in text
    assert "[bold]a[/bold]�[31m.gguf" in text
