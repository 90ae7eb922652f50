"""Packing rows: nothing is lost, nothing is too long, each conversation keeps its own place."""

import random

from qatlora.data.packing import packed
from qatlora.data.rows import IGNORED, Row


def rows(lengths):
    return [
        Row([n] * length, [IGNORED, *[n] * (length - 1)], "chat")
        for n, length in enumerate(lengths)
    ]


def unpacked(row):
    ends = [*row.starts[1:], len(row.input_ids)]
    return [
        Row(row.input_ids[start:end], row.labels[start:end], row.source)
        for start, end in zip(row.starts, ends, strict=True)
    ]


def test_every_row_is_found_again_whole_and_none_twice():
    rng = random.Random(1)
    before = rows([rng.randint(2, 100) for _ in range(300)])
    after = list(packed(before, 100))
    assert max(len(row.input_ids) for row in after) <= 100
    parts = [part for row in after for part in unpacked(row)]
    assert sorted(parts, key=lambda row: row.input_ids) == before
    full = sum(len(row.input_ids) for row in before) / 100
    assert full <= len(after) < 1.1 * full


def test_a_row_of_full_length_stays_alone_and_as_it_is():
    [alone] = rows([64])
    assert list(packed([alone], 64)) == [alone]


def test_what_a_conversation_begins_with_is_never_scored():
    begins_with_answer = Row([1, 2], [1, 2], "chat")
    [row] = packed([begins_with_answer, begins_with_answer], 8)
    assert row.labels == [IGNORED, 2, IGNORED, 2]
    assert row.num_scored_tokens == 2
