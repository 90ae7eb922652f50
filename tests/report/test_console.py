import io
from dataclasses import replace

from rich.console import Console

from qatlora.report.console import to_console
from qatlora.report.results import GuardResult


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
