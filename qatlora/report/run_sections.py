"""Sections that a run's report and its model card share, as paragraphs of Markdown.

All text that comes from outside passes through `qatlora.report.escape`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from qatlora.report.escape import inline, table
from qatlora.report.formatting import (
    format_bytes,
    format_count,
    format_figure,
    format_large_count,
    format_seconds,
    format_share,
)
from qatlora.report.results import AdapterResult, GuardResult, RunReport, TrainResult
from qatlora.report.results_curve import CurvePoint
from qatlora.report.summary import SCORE_HEADER, score_rows


def what_was_trained(report: RunReport) -> Iterator[tuple[str, str]]:
    """Pairs of a label and plain text: base, adapter, trained weights."""
    base, adapter = report.base, report.adapter
    if base:
        stored = f", stored as {base.storage}" if base.storage else ""
        share = f", {format_share(base.on_grid_share)} of the trained blocks on the Q4_0 grid"
        yield (
            "base",
            f"{base.name}, {format_large_count(base.parameters)} parameters{stored}"
            f"{share if base.on_grid_share is not None else ''}",
        )
    if adapter:
        yield (
            "adapter",
            f"{adapter.kind}: {'; '.join(_what_moves(adapter))}, "
            f"{format_large_count(adapter.trainable_parameters)} parameters in "
            f"{adapter.tensors} tensors",
        )
    if report.latents:
        yield (
            "trained weights",
            f"{format_large_count(report.latents.trainable_parameters)} parameters in "
            f"{report.latents.tensors} tensors, {report.latents.steps} steps",
        )


def _what_moves(adapter: AdapterResult) -> Iterator[str]:
    """The rule of the levels and that of the steps, each where it is trained."""
    if adapter.rank is not None:
        dither = "with dither" if adapter.dither else "no dither"
        scale = f"rank {adapter.rank}, alpha {format_figure(adapter.alpha)}"
        yield f"levels at {scale}, rounded over {adapter.rounding} steps, {dither}"
    if adapter.steps_rank is not None:
        yield f"steps at rank {adapter.steps_rank}"


def score_table(report: RunReport) -> Iterator[str]:
    """Perplexity and KLD of every model on every held-out text."""
    rows = [[inline(cell) for cell in row] for row in score_rows(report)]
    if rows:
        reference = "first model of a text" if report.validate else "teacher"
        yield (
            f"Held-out text. KLD is KL({reference} || model) in nats per token; same top is the "
            "share of tokens whose likeliest next token is that one's; ± is one standard error."
        )
        yield table(SCORE_HEADER, rows, "llrrrrrr")


def gate_table(guard: GuardResult) -> str:
    """Figure, limit and status of every gate."""
    rows = [
        [
            inline(gate.name),
            f"**{gate.status}**" if gate.status == "failed" else inline(gate.status),
            format_figure(gate.value),
            format_figure(gate.limit),
            inline(gate.unit),
        ]
        for gate in guard.gates
    ]
    return table(("gate", "status", "figure", "limit", "unit"), rows, "llrrl")


def training_line(train: TrainResult) -> str:
    """Steps, tokens, time, loss and memory in one line."""
    rate = f", {format_figure(train.tokens / train.seconds)} per second" if train.seconds else ""
    return (
        f"{format_count(train.steps)} steps, {format_count(train.tokens)} tokens with a loss in "
        f"{format_seconds(train.seconds)}{rate}. Loss {format_figure(train.loss_first)} to "
        f"{format_figure(train.loss_last)} nats per token. "
        f"Peak memory {format_bytes(train.peak_rss_bytes)}."
    )


def curve_line(points: Sequence[CurvePoint]) -> str:
    """What the plot of scores while training shows."""
    tokens = {point.text: point.tokens for point in points}
    counts = ", ".join(f"{inline(text)} {format_count(n)}" for text, n in tokens.items())
    return (
        f"The deployed model in training, on the first tokens of each held-out text: {counts}. "
        "Bands are one standard error of the level, which all points of a text share."
    )


def bullets(notes: Mapping[str, Any], depth: int = 0) -> Iterator[str]:
    """A mapping as a nested list; floats as figures, lists on one line."""
    for key, value in notes.items():
        head = f"{'  ' * depth}- {inline(str(key))}"
        if isinstance(value, Mapping):
            yield f"{head}:" if value else f"{head}: none"
            yield from bullets(value, depth + 1)
        else:
            yield f"{head}: {_note(value)}"


def versions_line(report: RunReport) -> str:
    """Every package with its version."""
    return ", ".join(f"{inline(name)} {inline(text)}" for name, text in report.versions.items())


def _note(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, int | float):
        return format_figure(value)
    if isinstance(value, list | tuple):
        return ", ".join(_note(item) for item in value) or "none"
    return inline(str(value))
