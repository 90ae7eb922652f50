"""Held-out text cut for llama-perplexity: full windows whose second half is scored."""

from collections.abc import Sequence

from qatlora.data.rows import IGNORED, Row


def half_scored_windows(
    rows: Sequence[Row], bos: int | None, window_tokens: int, max_windows: int
) -> list[Row]:
    """Join rows of one text and cut them anew.

    Args:
        rows: consecutive windows of a text, each with BOS in front if `bos` is given.
        bos: the token that every window begins with; None for none.
        window_tokens: length of a window.
        max_windows: the first ones are taken.

    Returns:
        At most `max_windows` rows; what does not fill a window is left out.
    """
    start = [] if bos is None else [bos]
    ids = [token for row in rows for token in row.input_ids[len(start) :]]
    size = window_tokens - len(start)
    heads = range(0, min(max_windows * size, len(ids) - size + 1), size)
    return [_second_half([*start, *ids[head : head + size]]) for head in heads]


def _second_half(ids: list[int]) -> Row:
    unscored = len(ids) // 2 + 1
    return Row(ids, [IGNORED] * unscored + ids[unscored:], "general")
