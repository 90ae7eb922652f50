"""Figures of a text against loops that can be read at a glance."""

import pytest
import torch

from qatlora.base.load import load_tokenizer
from qatlora.data.rows import IGNORED, Row, Text
from qatlora.evaluate import TokenScores
from qatlora.fidelity.figures import text_figures, worst_tokens

WINDOW = 32
ROWS = [
    Row(list(range(100, 132)), [IGNORED, *range(101, 132)], "general"),
    Row(list(range(200, 210)), [IGNORED] * 6 + list(range(206, 210)), "chat"),
]
NUM_SCORED = 31 + 4


@pytest.fixture
def scores() -> TokenScores:
    generator = torch.Generator().manual_seed(1)
    kld = torch.rand(NUM_SCORED, generator=generator)
    nll = torch.rand(NUM_SCORED, generator=generator)
    words = torch.arange(NUM_SCORED)
    return TokenScores(nll, kld, words < 9, nll + 0.1, words + 100, words + 150)


def scored_places() -> list[tuple[int, int]]:
    return [
        (number, position)
        for number, row in enumerate(ROWS)
        for position in range(1, len(row.labels))
        if row.labels[position] != IGNORED
    ]


def test_means_by_position_cover_every_scored_token_once(scores):
    parts = text_figures(scores, ROWS, WINDOW).by_position
    for part in parts:
        inside = [
            float(kld)
            for kld, (_, position) in zip(scores.kld, scored_places(), strict=True)
            if part.start <= position < part.stop
        ]
        assert part.tokens == len(inside)
        assert part.mean == pytest.approx(sum(inside) / len(inside))
    # The first part would hold position 1 of the first row alone: no standard error.
    assert sum(part.tokens for part in parts) == NUM_SCORED - 1


def test_the_histogram_counts_every_token(scores):
    assert sum(text_figures(scores, ROWS, WINDOW).histogram) == NUM_SCORED


def test_the_worst_tokens_are_shown_in_their_places(scores, tiny_llama_folder):
    tokenizer = load_tokenizer(tiny_llama_folder)
    texts = [Text("one", ROWS), Text("other", ROWS)]
    doubled = TokenScores(
        scores.nll, 2 * scores.kld, scores.same_top, scores.reference_nll, scores.top,
        scores.reference_top,
    )  # fmt: skip
    worst = worst_tokens({"one": scores, "other": doubled}, texts, tokenizer, 5)
    wanted = sorted([*scores.kld.tolist(), *doubled.kld.tolist()], reverse=True)[:5]
    assert [each.kld for each in worst] == wanted
    for each in worst:
        index = scored_places().index((each.row, each.position))
        factor = {"one": 1, "other": 2}[each.text]
        assert each.kld == factor * float(scores.kld[index])
        ids = ROWS[each.row].input_ids
        assert each.token == tokenizer.decode([ids[each.position]])
        assert each.before == tokenizer.decode(ids[: each.position])
        assert each.model_top == tokenizer.decode([index + 100])
        assert each.reference_top == tokenizer.decode([index + 150])
        assert each.probability > each.reference_probability
