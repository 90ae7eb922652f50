"""`report.md`: the verdict first, then the figures behind it, then how to run the file.

Sections without figures are left out. All text that comes from outside (prompts, answers, names,
messages, paths, notes) passes through `qatlora.report.escape`.
"""

import json
from collections.abc import Collection, Iterator

from qatlora.report.benchmark_plot import FORGETTING_PLOT, SPEED_PLOT
from qatlora.report.benchmark_text import benchmark_tables
from qatlora.report.cache_plot import CACHE_PLOT
from qatlora.report.cache_text import CACHE_HEADER, CACHE_LEGEND, cache_rows
from qatlora.report.changes import changes_by_kind
from qatlora.report.curve_plot import CURVE_PLOT
from qatlora.report.escape import code_span, fenced, inline, labelled, table
from qatlora.report.fidelity_plot import DISTRIBUTION_PLOT, POSITION_PLOT
from qatlora.report.fidelity_text import fidelity_tables
from qatlora.report.formatting import format_bytes, format_count, format_seconds, format_share
from qatlora.report.inspect_plot import INSPECT_PLOT
from qatlora.report.inspect_text import tables as inspect_tables
from qatlora.report.json_report import plain
from qatlora.report.plan_text import plan_tables
from qatlora.report.plots import CHANGES_PLOT, KLD_PLOT, LOSS_PLOT
from qatlora.report.preview_plot import LENGTHS_PLOT
from qatlora.report.preview_text import preview_sections
from qatlora.report.results import MODELS, GuardResult, RunReport
from qatlora.report.results_runtime import RuntimeResult
from qatlora.report.results_validate import ValidateResult
from qatlora.report.run_it import run_it
from qatlora.report.run_sections import (
    bullets,
    curve_line,
    gate_table,
    score_table,
    training_line,
    versions_line,
    what_was_trained,
)
from qatlora.report.runtime_text import RUNTIME_HEADER, runtime_caption, runtime_rows
from qatlora.report.summary import facts, verdict
from qatlora.report.validate_text import KEPT_HEADER, TYPES_HEADER, kept_rows, type_rows

_VERBATIM = ("file", "run it", "folder", "sha256", "checkpoint", "digest as a base", "step patch")


def to_markdown(report: RunReport, plots: Collection[str] = ()) -> str:
    """The text of `report.md`.

    Args:
        report: the run.
        plots: names of the plot files that lie beside the report.
    """
    on = f" on {inline(report.base.name)}" if report.base else ""
    title = f"# {inline(report.recipe)}{on}"
    sections = [
        ("", _verdict(report)),
        ("What Q4_0 keeps", _validation(report.validate)),
        ("Tensors on the grid", _inspection(report, plots)),
        ("Memory", plan_tables(report.plan) if report.plan else ()),
        ("Conversations", _preview(report, plots)),
        ("Benchmark", _benchmark(report, plots)),
        ("What the cache keeps", _cache(report, plots)),
        ("Models against their references", _fidelity(report, plots)),
        ("Perplexity and KLD", _scores(report, plots)),
        ("Gates", _gates(report.guard)),
        ("In llama.cpp", _runtime(report.runtime)),
        ("What changed", _changes(report, plots)),
        ("Answers before and after", _samples(report)),
        ("Training", _training(report, plots)),
        ("Time and memory", _time_and_memory(report)),
        ("Data", _data(report)),
        ("Versions", [versions_line(report)]),
        ("Run it", run_it(report)),
        ("Settings", _settings(report)),
    ]
    parts = [title]
    for heading, paragraphs in sections:
        body = [paragraph for paragraph in paragraphs if paragraph]
        if body:
            parts += [f"## {heading}", *body] if heading else body
    return "\n\n".join(parts) + "\n"


def _verdict(report: RunReport) -> Iterator[str]:
    outcome = verdict(report)
    yield f"**{inline(outcome.headline)}**"
    yield "\n>\n".join(f"> {inline(reason)}" for reason in outcome.reasons)
    yield "\n".join(
        f"- {label}: {code_span(value) if label in _VERBATIM else inline(value)}"
        for label, value in [*facts(report), *what_was_trained(report)]
    )


def _validation(result: ValidateResult | None) -> Iterator[str]:
    if result is None:
        return
    if result.kept:
        rows = [[inline(cell) for cell in row] for row in kept_rows(result)]
        yield "Shares of the merge's effect: of the fall of the held-out loss, and by the KLD."
        yield table(KEPT_HEADER, rows, "lrrr")
    yield "The trained tensors of the checkpoint in each type."
    yield table(TYPES_HEADER, [[inline(cell) for cell in row] for row in type_rows(result)], "lrr")


def _inspection(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.inspect is not None:
        yield _plot(INSPECT_PLOT, "Share on the grid, errors and peak levels", plots)
        yield from inspect_tables(report.inspect)


def _preview(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.preview is not None:
        yield _plot(LENGTHS_PLOT, "Lengths of the conversations", plots)
        yield from preview_sections(report.preview)


def _benchmark(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.benchmark is not None:
        yield from benchmark_tables(report.benchmark)
        yield _plot(SPEED_PLOT, "Step time and peak memory over plain PEFT's", plots)
        yield _plot(FORGETTING_PLOT, "Gain on the task against forgetting", plots)


def _cache(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.teacher_cache is not None:
        yield CACHE_LEGEND
        rows = [[inline(cell) for cell in row] for row in cache_rows(report.teacher_cache)]
        yield table(CACHE_HEADER, rows, "lrrrrrr")
        yield _plot(CACHE_PLOT, "Divergence lost and size over the words kept", plots)


def _fidelity(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.fidelity is not None:
        yield _plot(DISTRIBUTION_PLOT, "Share of tokens above a KLD", plots)
        yield _plot(POSITION_PLOT, "Mean KLD by position in the window", plots)
        yield from fidelity_tables(report.fidelity)


def _scores(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    yield from score_table(report)
    yield _plot(KLD_PLOT, "Distribution of the per-token KLD to the teacher", plots)


def _gates(guard: GuardResult | None) -> Iterator[str]:
    if guard is None or not guard.gates:
        return
    yield gate_table(guard)
    yield "\n".join(  # a failed gate's message stands at the top of the report
        f"- {inline(gate.name)}: {inline(gate.message)}"
        for gate in guard.gates
        if gate.message and gate.status != "failed"
    )


def _runtime(result: RuntimeResult | None) -> Iterator[str]:
    if result is not None:
        yield runtime_caption(result)
        rows = [[inline(cell) for cell in row] for row in runtime_rows(result)]
        yield table(RUNTIME_HEADER, rows, "lrrrrr")


def _changes(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    kinds = changes_by_kind(report.changes)
    if not kinds:
        return
    if not any(kind.codes_max or kind.steps_max for kind in kinds):
        yield "**The merge changed no code and no step: the merged model is the base.**"
    rows = [
        [
            inline(kind.kind),
            format_count(kind.num_tensors),
            *(
                format_share(share)
                for share in (kind.codes_mean, kind.codes_max, kind.steps_mean, kind.steps_max)
            ),
        ]
        for kind in kinds
    ]
    yield "Shares of a tensor's codes and steps that differ from the base's."
    header = ("kind", "tensors", "codes, mean", "codes, most", "steps, mean", "steps, most")
    yield table(header, rows, "lrrrrr")
    yield _plot(CHANGES_PLOT, "Share of codes and steps changed, by layer", plots)


def _samples(report: RunReport) -> Iterator[str]:
    for sample in report.samples:
        known = [model for model in MODELS if model in sample.answers]
        models = [*known, *(model for model in sample.answers if model not in MODELS)]
        parts = [("prompt", sample.prompt), *((model, sample.answers[model]) for model in models)]
        indent = max(len(label) for label, _ in parts) + 2
        yield fenced(
            "\n\n".join(labelled(label, text, label_width=indent) for label, text in parts)
        )


def _training(report: RunReport, plots: Collection[str]) -> Iterator[str]:
    if report.train:
        yield training_line(report.train)
    yield _plot(LOSS_PLOT, "Loss over the optimizer steps", plots)
    if report.train and report.train.curve:
        yield curve_line(report.train.curve)
    yield _plot(CURVE_PLOT, "KLD and perplexity over the optimizer steps", plots)


def _time_and_memory(report: RunReport) -> Iterator[str]:
    if report.stages:
        total = sum(stage.seconds for stage in report.stages)
        rows = [[inline(stage.stage), format_seconds(stage.seconds)] for stage in report.stages]
        yield table(("stage", "time"), [*rows, ["all", format_seconds(total)]], "lr")
    if report.peak_rss_bytes:
        yield f"Peak memory of the run: {format_bytes(report.peak_rss_bytes)}."


def _data(report: RunReport) -> Iterator[str]:
    yield "\n".join(bullets(report.data_notes))


def _settings(report: RunReport) -> Iterator[str]:
    if report.settings:
        yield fenced(json.dumps(plain(report.settings), indent=2, ensure_ascii=False), "json")


def _plot(name: str, caption: str, plots: Collection[str]) -> str:
    return f"![{caption}]({name})" if name in plots else ""
