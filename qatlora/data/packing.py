"""Several conversations in one row, so that little of a batch is padding.

They do not see each other: `Row.starts` says where each begins, positions count from there, and
transformers masks attention between them. Losses per token are those of unpacked rows.
"""

from collections.abc import Iterable, Iterator

from qatlora.data.rows import IGNORED, Row

_OPEN_ROWS = 16
"""Rows that wait for something that fits: more fill better and mix the order more."""


def packed(rows: Iterable[Row], max_length: int) -> Iterator[Row]:
    """Rows of at most `max_length` tokens; each row goes whole into the first that has room."""
    waiting: list[list[Row]] = []
    for row in rows:
        room = max_length - len(row.input_ids)
        fitting = (one for one in waiting if _length(one) <= room)
        group = next(fitting, None)
        if group is not None:
            group.append(row)
            continue
        if len(waiting) == _OPEN_ROWS:
            fullest = max(range(_OPEN_ROWS), key=lambda place: _length(waiting[place]))
            yield _joined(waiting.pop(fullest))
        waiting.append([row])
    yield from map(_joined, waiting)


def _length(rows: list[Row]) -> int:
    return sum(len(row.input_ids) for row in rows)


def _joined(rows: list[Row]) -> Row:
    """One row; what a conversation begins with has nothing of its own before it, so no label."""
    ids: list[int] = []
    labels: list[int] = []
    starts: list[int] = []
    for row in rows:
        starts.append(len(ids))
        ids += row.input_ids
        labels += [IGNORED, *row.labels[1:]]
    return Row(ids, labels, rows[0].source, tuple(starts))
