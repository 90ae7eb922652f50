from qatlora.data.rows import IGNORED, Row
from qatlora.data.windows import half_scored_windows

TEXT = list(range(10, 31))
BOS = 2


def rows(bos: int | None, length: int) -> list[Row]:
    start = [] if bos is None else [bos]
    size = length - len(start)
    parts = [[*start, *TEXT[head : head + size]] for head in range(0, len(TEXT), size)]
    return [Row(part, [IGNORED, *part[1:]], "general") for part in parts]


def test_rows_of_any_length_give_the_same_full_windows_of_one_text():
    expected = [[BOS, *TEXT[0:7]], [BOS, *TEXT[7:14]], [BOS, *TEXT[14:21]]]
    for length in (4, 9, 50):
        found = half_scored_windows(rows(BOS, length), BOS, 8, 9)
        assert [row.input_ids for row in found] == expected


def test_the_second_half_is_scored_as_llama_perplexity_does():
    (row,) = half_scored_windows(rows(BOS, 9), BOS, 8, 1)
    assert row.labels == [IGNORED] * 5 + row.input_ids[5:]
    (odd,) = half_scored_windows(rows(BOS, 9), BOS, 9, 1)
    assert odd.num_scored_tokens == 9 - 1 - 9 // 2


def test_without_bos_nothing_is_put_in_front_and_the_rest_is_left_out():
    found = half_scored_windows(rows(None, 5), None, 8, 9)
    assert [row.input_ids for row in found] == [TEXT[0:8], TEXT[8:16]]


def test_a_text_shorter_than_a_window_gives_none():
    assert half_scored_windows(rows(BOS, 4), BOS, 64, 3) == []
