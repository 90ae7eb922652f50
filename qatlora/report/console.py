"""The table at the end of a run in the terminal: verdict, figures, gates, where the report lies."""

from collections.abc import Sequence

from rich import box
from rich.console import Group, JustifyMethod, RenderableType
from rich.table import Table
from rich.text import Text

from qatlora.report.benchmark_text import benchmark_cells
from qatlora.report.cache_text import CACHE_HEADER, cache_rows
from qatlora.report.doctor_text import DOCTOR_HEADER, doctor_rows
from qatlora.report.escape import visible
from qatlora.report.fidelity_text import CONSOLE_HEADER, console_cells
from qatlora.report.formatting import format_bytes, format_figure, format_seconds
from qatlora.report.inspect_text import KIND_HEADER, kind_rows
from qatlora.report.llama_cpp_text import CONSOLE_HEADER as LLAMA_CPP_HEADER
from qatlora.report.llama_cpp_text import short_cells
from qatlora.report.plan_text import fit_cells, part_cells
from qatlora.report.preview_text import (
    LENGTH_HEADER,
    example_title,
    highlighted,
    length_rows,
)
from qatlora.report.results import GuardResult, RunReport
from qatlora.report.results_inspect import InspectResult
from qatlora.report.results_preview import PreviewResult
from qatlora.report.results_runtime import RuntimeResult
from qatlora.report.runtime_text import RUNTIME_HEADER, runtime_rows
from qatlora.report.summary import SCORE_HEADER, facts, score_rows, verdict
from qatlora.report.validate_text import KEPT_HEADER, TYPES_HEADER, kept_rows, type_rows

_STATUS_STYLES = {"passed": "green", "failed": "bold red", "skipped": "yellow"}


def to_console(report: RunReport) -> RenderableType:
    """A rich renderable of `report` for `rich.console.Console.print`; fits 80 columns."""
    parts: list[RenderableType] = []
    rows = score_rows(report)
    if rows:
        parts.append(_score_table(rows))
    if report.inspect:
        parts.append(_inspect_table(report.inspect))
    if report.validate:
        if report.validate.kept:
            parts.append(plain_table("Q4_0 exports", KEPT_HEADER, kept_rows(report.validate)))
        parts.append(plain_table("trained tensors", TYPES_HEADER, type_rows(report.validate)))
    if report.preview:
        parts += _preview_parts(report.preview)
    if report.benchmark:
        parts.append(plain_table("benchmark", *benchmark_cells(report.benchmark, ranges=False)))
    if report.teacher_cache:
        rows = cache_rows(report.teacher_cache)
        parts.append(plain_table("held-out text", CACHE_HEADER, rows))
    if report.plan:
        parts.append(plain_table("memory", *part_cells(report.plan)))
        parts.append(plain_table("longest row of tokens", *fit_cells(report.plan)))
    if report.doctor:
        rows = doctor_rows(report.doctor)
        parts.append(plain_table("this machine", DOCTOR_HEADER, rows, num_left=4))
    if report.fidelity:
        cells = console_cells(report.fidelity)
        parts.append(plain_table("KLD to the reference", CONSOLE_HEADER, cells, num_left=2))
        if rows := short_cells(report.fidelity):
            parts.append(plain_table("in llama.cpp", LLAMA_CPP_HEADER, rows, num_left=3))
    if report.guard and report.guard.gates:
        parts.append(_gate_table(report.guard))
    if report.runtime:
        parts.append(_runtime_table(report.runtime))
    outcome = verdict(report)
    style = {True: "bold green", False: "bold red", None: "bold"}[outcome.good]
    parts.append(Text(visible(outcome.headline), style=style))
    parts += [Text(f"  {visible(reason)}") for reason in outcome.reasons]
    parts.append(_fact_grid(report))
    return Group(*parts)


def _score_table(rows: list[list[str]]) -> Table:
    # The widest: collapsed padding leaves room for a third model's name in 80 columns.
    table = Table(
        title="held-out text",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        collapse_padding=True,
    )
    for name in SCORE_HEADER:
        justify: JustifyMethod = "left" if name in ("text", "model") else "right"
        table.add_column(name.replace(" ", "\n"), justify=justify, no_wrap=True)
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _inspect_table(result: InspectResult) -> Table:
    table = Table(title="trained list", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in KIND_HEADER:
        table.add_column(name.replace(" ", "\n"), justify="left" if name == "kind" else "right")
    for row in kind_rows(result):
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _preview_parts(result: PreviewResult) -> list[RenderableType]:
    parts: list[RenderableType] = []
    for number, example in enumerate(result.examples, 1):
        parts += [Text(example_title(example, number), style="bold"), highlighted(example), Text()]
    return [
        *parts,
        plain_table("lengths up to the last answer", LENGTH_HEADER, length_rows(result)),
    ]


def plain_table(
    title: str, header: Sequence[str], rows: list[list[str]], num_left: int = 1
) -> Table:
    """A table whose first columns stand to the left, figures to the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, name in enumerate(header):
        justify: JustifyMethod = "left" if index < num_left else "right"
        table.add_column(name.replace(" ", "\n"), justify=justify, overflow="fold")
    for row in rows:
        table.add_row(*(Text(visible(cell)) for cell in row))
    return table


def _runtime_table(result: RuntimeResult) -> Table:
    """Without p99, for which 80 columns have no room; report.md has it."""
    kept = [index for index, name in enumerate(RUNTIME_HEADER) if name != "p99"]
    rows = [[row[index] for index in kept] for row in runtime_rows(result)]
    return plain_table("in llama.cpp", [RUNTIME_HEADER[index] for index in kept], rows)


def _gate_table(guard: GuardResult) -> Table:
    table = Table(title="guard", title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in ("gate", "status", "figure", "limit", "unit"):
        table.add_column(name, justify="right" if name in ("figure", "limit") else "left")
    for gate in guard.gates:
        table.add_row(
            Text(visible(gate.name)),
            Text(gate.status, style=_STATUS_STYLES.get(gate.status, "")),
            format_figure(gate.value),
            format_figure(gate.limit),
            Text(visible(gate.unit)),
        )
    return table


def _fact_grid(report: RunReport) -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(style="dim")
    grid.add_column(overflow="fold")
    for label, value in facts(report):
        grid.add_row(Text(visible(label)), Text(visible(value)))
    if report.stages:
        total = sum(stage.seconds for stage in report.stages)
        grid.add_row("time", format_seconds(total))
    if report.peak_rss_bytes:
        grid.add_row("peak memory", format_bytes(report.peak_rss_bytes))
    return grid
