"""Scores per token as the figures of a report: statistics, course over the window, worst tokens."""

from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from qatlora.data.rows import IGNORED, Row, Text
from qatlora.evaluate import TokenScores, mean_of, summarize
from qatlora.evaluate.models import kld_histogram
from qatlora.report.results_fidelity import FidelityText, PositionMean, WorstToken

_POSITION_BINS = 16
_CONTEXT_TOKENS = 32


def text_figures(scores: TokenScores, rows: Sequence[Row], window_tokens: int) -> FidelityText:
    """Reduce the scores of a text; they are against a reference and in the order of the rows."""
    summary = summarize(scores)
    assert summary.kld is not None
    assert summary.against is not None
    assert scores.kld is not None
    return FidelityText(
        tokens=summary.num_tokens,
        perplexity=summary.perplexity,
        perplexity_stderr=summary.perplexity_stderr,
        reference_perplexity=summary.against.reference,
        reference_perplexity_stderr=summary.against.reference_stderr,
        ratio=summary.against.ratio,
        ratio_stderr=summary.against.ratio_stderr,
        kld=summary.kld,
        histogram=kld_histogram(scores.kld),
        by_position=_by_position(scores.kld, scored_places(rows)[:, 1], window_tokens),
    )


def worst_tokens(
    scores: Mapping[str, TokenScores],
    texts: Sequence[Text],
    tokenizer: PreTrainedTokenizerBase,
    number: int,
) -> list[WorstToken]:
    """The `number` tokens of all texts with the largest KLD, the worst first."""
    found = [
        (float(kld), text, index)
        for text in texts
        for kld, index in zip(*_largest(scores[text.name], number), strict=True)
    ]
    found.sort(key=lambda each: -each[0])
    return [
        _in_context(text, scores[text.name], index, tokenizer) for _, text, index in found[:number]
    ]


def _largest(scores: TokenScores, number: int) -> tuple[list[float], list[int]]:
    assert scores.kld is not None
    largest = scores.kld.topk(min(number, len(scores.kld)))
    return largest.values.tolist(), largest.indices.tolist()


def _in_context(
    text: Text, scores: TokenScores, index: int, tokenizer: PreTrainedTokenizerBase
) -> WorstToken:
    kld, nll, reference_nll = scores.kld, scores.nll, scores.reference_nll
    assert kld is not None
    assert reference_nll is not None
    row, position = scored_places(text.rows)[index].tolist()
    ids = text.rows[row].input_ids

    def words(tokens: Sequence[int]) -> str:
        return str(tokenizer.decode(tokens))

    def top(of: Tensor | None) -> str:
        assert of is not None
        return words([int(of[index])])

    return WorstToken(
        text=text.name,
        row=row,
        position=position,
        kld=float(kld[index]),
        before=words(ids[max(0, position - _CONTEXT_TOKENS) : position]),
        token=words([ids[position]]),
        reference_top=top(scores.reference_top),
        model_top=top(scores.top),
        reference_probability=float(torch.exp(-reference_nll[index])),
        probability=float(torch.exp(-nll[index])),
    )


def scored_places(rows: Sequence[Row]) -> Tensor:
    """Row and position of each token, int64 [n, 2], in the order in which they are scored."""
    return torch.tensor(
        [
            (number, position)
            for number, row in enumerate(rows)
            for position, label in enumerate(row.labels)
            if position > 0 and label != IGNORED
        ]
    )


def _by_position(kld: Tensor, positions: Tensor, window_tokens: int) -> list[PositionMean]:
    """Means over equal parts of the window; parts with fewer than two tokens are left out."""
    edges = torch.linspace(0, window_tokens, _POSITION_BINS + 1).round().long().unique().tolist()
    means = []
    for start, stop in pairwise(edges):
        inside = kld[(positions >= start) & (positions < stop)]
        if len(inside) >= 2:
            mean = mean_of(inside)
            means.append(PositionMean(start, stop, len(inside), mean.value, mean.stderr))
    return means
