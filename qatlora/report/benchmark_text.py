"""The benchmark's tables: what was compared, one line per method, and what the columns mean."""

import dataclasses
from collections.abc import Iterator

from qatlora.report.escape import inline, table
from qatlora.report.formatting import (
    MISSING,
    format_bytes,
    format_count,
    format_figure,
    format_large_count,
    format_share,
)
from qatlora.report.results_benchmark import (
    BOUND,
    AdaptersResult,
    BenchmarkResult,
    MethodSummary,
    SpeedResult,
    SpeedRow,
    Spread,
)

_SPEED_HEADER = ("method", "tokens", "seconds", "time ratio", "peak", "memory ratio", "of storage")
_ADAPTERS_HEADER = (
    "method", "rate", "task", "share", "general", "KLD general", "codes", "trained", "seconds",
)  # fmt: skip


def benchmark_cells(
    result: BenchmarkResult, *, ranges: bool = True
) -> tuple[tuple[str, ...], list[list[str]]]:
    """Header and rows of the suite that ran, as plain text.

    Args:
        result: of the suite.
        ranges: False for medians and short names, without the seconds, which fits 80 columns.
    """
    if result.speed is not None:
        return _SPEED_HEADER, [_speed_cells(row) for row in result.speed.rows]
    assert result.adapters is not None
    before = result.adapters.before
    first = ["before", "", f"{before.task:.4f}", "", f"{before.general:.4f}", "", "", "", ""]
    summaries = result.adapters.summaries
    if ranges:
        return _ADAPTERS_HEADER, [first, *map(_adapters_cells, summaries)]
    rows = [first, *(_adapters_cells(_medians(each)) for each in summaries)]
    return _ADAPTERS_HEADER[:-1], [row[:-1] for row in rows]


def benchmark_tables(result: BenchmarkResult) -> Iterator[str]:
    """Paragraphs of Markdown: the setting, the table, the legend."""
    header, rows = benchmark_cells(result)
    about = _about_speed(result.speed) if result.speed else ""
    if result.adapters is not None:
        about = _about_adapters(result.adapters)
    yield about
    cells = [[inline(cell) for cell in row] for row in rows]
    yield table(header, cells, "l" + "r" * (len(header) - 1))
    if result.adapters is not None:
        yield "\n".join(f"- {inline(line)}" for line in result.adapters.skipped)


def _about_speed(result: SpeedResult) -> str:
    kept = "kept" if result.keep_blocks else "computed again"
    return (
        f"One optimizer step on {inline(result.device)}, {result.threads} threads, rows of "
        f"{result.row_tokens} tokens, {result.rounds} rounds in which the methods took turns; "
        f"blocks {kept} in the backward pass. Ratios are to {inline(result.baseline)}, time as the "
        "median over rounds. Peak memory is that of the method's own process, less what it held "
        "before the model was loaded; *of storage* is the ratio that the stored bits alone give."
    )


def _about_adapters(result: AdaptersResult) -> str:
    base = "on the grid as it was"
    if result.rounded_by:
        base = f"rounded to the grid by {inline(result.rounded_by)}"
    return (
        f"Base {base}; {result.max_steps} steps of {result.tokens_per_step} tokens of "
        f"{inline(result.domain)}, plain cross-entropy. Losses in nats per token on held-out text, "
        "as llama.cpp would run the model (the bound: unmerged, in brackets what is left of its "
        "share after merge and llama-quantize). Share: of the bound's gain on the task. KLD: from "
        "the base, on general text. Rate: tuned on the first seed, on text of its own. Trained: "
        "parameters. Medians over the seeds, the range behind them."
    )


def _speed_cells(row: SpeedRow) -> list[str]:
    return [
        row.method,
        format_count(row.tokens_per_step),
        f"{row.seconds_median:.3f}",
        _ratio(row.time_ratio),
        format_bytes(row.peak_bytes),
        _ratio(row.memory_ratio),
        _ratio(row.memory_ratio_of_storage),
    ]


def _adapters_cells(summary: MethodSummary) -> list[str]:
    share = _percent(summary.share)
    if summary.method == BOUND and summary.merged_share is not None:
        share += f" ({_percent(summary.merged_share)} merged)"
    return [
        summary.label,
        format_figure(summary.learning_rate),
        _figures(summary.task),
        share,
        _figures(summary.general),
        _figures(summary.general_kld),
        format_share(summary.codes_changed.median) if summary.codes_changed else MISSING,
        format_large_count(summary.trainable_parameters),
        f"{summary.seconds.median:.0f}",
    ]


def _medians(summary: MethodSummary) -> MethodSummary:
    """The same under its short name, without ranges and brackets."""
    shown = {
        key: dataclasses.replace(spread, low=spread.median, high=spread.median)
        for key in ("task", "share", "general", "general_kld")
        if (spread := getattr(summary, key)) is not None
    }
    return dataclasses.replace(summary, label=summary.method, merged_share=None, **shown)


def _ratio(value: float | None) -> str:
    return MISSING if value is None else f"{value:.2f}"


def _figures(spread: Spread) -> str:
    if spread.low == spread.high:
        return f"{spread.median:.4f}"
    return f"{spread.median:.4f} [{spread.low:.4f}, {spread.high:.4f}]"


def _percent(spread: Spread | None) -> str:
    if spread is None:
        return MISSING
    if spread.low == spread.high:
        return f"{100 * spread.median:.0f} %"
    return f"{100 * spread.median:.0f} % [{100 * spread.low:.0f}, {100 * spread.high:.0f}]"
