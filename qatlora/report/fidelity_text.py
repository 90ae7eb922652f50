"""The comparison of models in words and tables: who is nearest, by how much, where each fails."""

import math
from collections.abc import Iterator, Sequence
from itertools import pairwise

from qatlora.report.escape import inline, table
from qatlora.report.formatting import (
    format_bytes,
    format_count,
    format_figure,
    format_share,
    format_with_error,
)
from qatlora.report.llama_cpp_text import caption, judged, line_cells
from qatlora.report.results_fidelity import (
    FidelityModel,
    FidelityReference,
    FidelityResult,
    FidelityText,
    WorstToken,
)

Cells = list[list[str]]

_SIGNIFICANT_STANDARD_ERRORS = 2.0
_CARD_COLUMNS = ("median", "mean")
_CARD_TEXTS = {"wiki": "WikiText-like", "c4": "C4-like"}

STATISTICS_HEADER = (
    "text", "model", "tokens", "KLD mean", "median", "p90", "p95", "p99", "p99.9", "max", "min",
    "same top", "RMS Δp", "perplexity", "reference", "ratio",
)  # fmt: skip
CONSOLE_HEADER = ("text", "model", "KLD mean", "median", "p99", "same top")
CHANGE_HEADER = (
    "text", "run", "perplexity before", "after", "KLD before", "after", "same top before", "after",
)  # fmt: skip
WORST_HEADER = (
    "KLD", "text", "before", "token", "P reference", "P model", "top of reference", "top of model",
)  # fmt: skip
LEGEND = (
    "KLD is KL(reference || model) over the whole vocabulary, in nats per token; same top is the "
    "share of tokens at which both have the same likeliest word; Δp is the change of the "
    "probability of the token that follows; reference and ratio are the reference's perplexity and "
    "the model's over it. Definitions are those of llama-perplexity; ± is one standard error. A "
    "low perplexity ratio alone says little: a broken model can gain on one text."
)


def headlines(result: FidelityResult) -> list[str]:
    """Sentences per reference: the models in order, and which neighbours cannot be told apart."""
    sentences = []
    for reference in by_choice(result):
        ranked = candidates(result, reference)
        if not ranked:
            continue
        places = [
            f"{model.name} {format_with_error(model.mean_kld, model.mean_kld_stderr)} "
            f"({format_bytes(model.bytes)})"
            for model in ranked
        ]
        notes = [
            f" {one.name} and {other.name} cannot be told apart on so few tokens."
            for one, other in pairwise(ranked)
            if not _is_nearer(one, other)
        ]
        sentences.append(
            f"Nearest to {reference.name}, by mean KLD over the texts: {', '.join(places)}."
            + "".join(notes)
        )
    return sentences


def by_choice(result: FidelityResult) -> list[FidelityReference]:
    """The references, first those between whose models there is a choice."""
    return sorted(result.references, key=lambda each: len(candidates(result, each)) < 2)


def candidates(result: FidelityResult, reference: FidelityReference) -> list[FidelityModel]:
    """What could be shipped, nearest first: neither the reference nor an adapter run's base."""
    return [
        model
        for model in result.ranked(reference.name)
        if model.given != reference.given and not _is_a_before(model, result)
    ]


def advice(model: FidelityModel, ranked: Sequence[FidelityModel]) -> str:
    """What speaks for or against a candidate beside the others, in a few words.

    Args:
        model: one of `ranked`; any other gets none.
        ranked: the candidates, nearest first; a single one gets none, either.
    """
    if model not in ranked or len(ranked) == 1:
        return ""
    nearest, smallest = ranked[0], min(ranked, key=lambda other: other.bytes)
    nearer = [other for other in ranked if other.bytes <= model.bytes and _is_nearer(other, model)]
    if nearer:
        return f"{nearer[0].name} is nearer and no larger"
    if model is nearest:
        return "nearest and smallest" if model is smallest else "nearest"
    saved = f"{1 - model.bytes / nearest.bytes:.0%} smaller than {nearest.name}"
    if model.bytes >= nearest.bytes:
        return f"not told apart from {nearest.name}"
    return saved if _is_nearer(nearest, model) else f"{saved}, not told apart from it"


def card_cells(result: FidelityResult) -> tuple[list[str], Cells]:
    """Rows and columns as on public model cards: median and mean KLD of each text, then the size.

    Returns:
        Header, and a row per model in the order given.
    """
    texts = list(result.models[0].texts)
    names = [_CARD_TEXTS.get(text, text) for text in texts]
    header = ["model", *(f"{name}, {what}" for name in names for what in _CARD_COLUMNS), "size"]
    rows = []
    for model in result.models:
        figures = [
            format_figure(value, decimals=True)
            for text in texts
            for value in (model.texts[text].kld.median, model.texts[text].kld.mean)
        ]
        rows.append([model.title, *figures, format_bytes(model.bytes)])
    return header, rows


def card_table(result: FidelityResult) -> str:
    """`card_cells` as Markdown."""
    header, rows = card_cells(result)
    return _markdown(header, rows, num_left=1)


def statistics_cells(result: FidelityResult) -> Cells:
    """Cells below `STATISTICS_HEADER`, text by text."""
    return [
        [text, model.name, *_statistics(model.texts[text])]
        for text in result.models[0].texts
        for model in result.models
    ]


def console_cells(result: FidelityResult) -> Cells:
    """Cells below `CONSOLE_HEADER`, text by text."""
    rows = []
    for text in result.models[0].texts:
        for model in result.models:
            kld = model.texts[text].kld
            rows.append(
                [
                    text,
                    model.name,
                    format_with_error(kld.mean, kld.mean_stderr),
                    *(format_figure(value, decimals=True) for value in (kld.median, kld.p99)),
                    format_share(kld.same_top),
                ]
            )
    return rows


def change_cells(result: FidelityResult) -> Cells:
    """Cells below `CHANGE_HEADER`: what training changed, a row per adapter run and text."""
    by_name = {model.name: model for model in result.models}
    rows = []
    for model in result.models:
        if model.before is None:
            continue
        for text, after in model.texts.items():
            before = by_name[model.before].texts[text]
            both = (before, after)
            rows.append(
                [
                    text,
                    model.name,
                    *(format_with_error(each.perplexity, each.perplexity_stderr) for each in both),
                    *(format_with_error(each.kld.mean, each.kld.mean_stderr) for each in both),
                    *(format_share(each.kld.same_top) for each in both),
                ]
            )
    return rows


def worst_cells(worst: WorstToken) -> list[str]:
    """Cells below `WORST_HEADER`; words in quotes, so that spaces and line breaks are seen."""
    return [
        format_figure(worst.kld, decimals=True),
        f"{worst.text} {worst.row}:{worst.position}",
        _quoted(worst.before),
        _quoted(worst.token),
        format_figure(worst.reference_probability, decimals=True),
        format_figure(worst.probability, decimals=True),
        _quoted(worst.reference_top),
        _quoted(worst.model_top),
    ]


def self_klds(result: FidelityResult) -> list[tuple[str, str]]:
    """Label and text of the check that every reference has passed."""
    return [
        (f"KLD of {reference.name} to itself", f"{format_figure(reference.self_kld_max)} nats")
        for reference in result.references
    ]


def fidelity_tables(result: FidelityResult) -> Iterator[str]:
    """Paragraphs of Markdown: the card's table, all statistics, before and after, worst tokens."""
    yield card_table(result)
    yield inline(LEGEND)
    yield _markdown(STATISTICS_HEADER, statistics_cells(result), num_left=2)
    if judged(result):
        yield inline(caption(result))
    for model in judged(result):
        yield f"{inline(model.name)}, here and in llama.cpp:"
        yield _markdown(*line_cells(model), num_left=1)
    if changes := change_cells(result):
        yield _markdown(CHANGE_HEADER, changes, num_left=2)
    for model in result.models:
        if model.worst:
            yield f"Tokens with the largest KLD of {inline(model.name)}, in their context:"
            yield _markdown(WORST_HEADER, [worst_cells(each) for each in model.worst])


def _markdown(header: Sequence[str], rows: Cells, num_left: int | None = None) -> str:
    left = len(header) if num_left is None else num_left
    cells = [[inline(cell) for cell in row] for row in rows]
    return table([inline(name) for name in header], cells, "l" * left + "r" * (len(header) - left))


def _statistics(figures: FidelityText) -> list[str]:
    kld = figures.kld
    plain = (kld.median, kld.p90, kld.p95, kld.p99, kld.p999, kld.max, kld.min)
    return [
        format_count(figures.tokens),
        format_with_error(kld.mean, kld.mean_stderr),
        *(format_figure(value, decimals=True) for value in plain),
        f"{format_share(kld.same_top)} ± {100 * kld.same_top_stderr:.2f}",
        f"{format_share(kld.rms_dp)} ± {100 * kld.rms_dp_stderr:.2f}",
        format_with_error(figures.perplexity, figures.perplexity_stderr),
        format_with_error(figures.reference_perplexity, figures.reference_perplexity_stderr),
        format_with_error(figures.ratio, figures.ratio_stderr),
    ]


def _quoted(text: str) -> str:
    return f"“{text}”".replace("\n", "⏎")


def _is_nearer(one: FidelityModel, other: FidelityModel) -> bool:
    """Whether a mean is lower by more than the errors; unpaired, so on the safe side."""
    error = math.hypot(one.mean_kld_stderr, other.mean_kld_stderr)
    return other.mean_kld - one.mean_kld > _SIGNIFICANT_STANDARD_ERRORS * error


def _is_a_before(model: FidelityModel, result: FidelityResult) -> bool:
    return any(other.before == model.name for other in result.models)
