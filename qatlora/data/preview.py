"""A set of conversations as training would take it in, without a model."""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from transformers import PreTrainedTokenizerBase

from qatlora.config import DataConfig, PreviewConfig
from qatlora.data.course import ChatCourse
from qatlora.data.encode import ChatEncoder, Encoded
from qatlora.data.load import count, cuts_long
from qatlora.data.packing import packed
from qatlora.data.rows import IGNORED, Row
from qatlora.data.sources import open_conversations
from qatlora.data.templates import training_template, turn_rules
from qatlora.report.results_preview import (
    LengthBin,
    PreviewExample,
    PreviewPiece,
    PreviewResult,
)

_SHORTEST_BIN_TOKENS = 16


@dataclass(frozen=True)
class OpenedData:
    """The conversations that are looked at, ready to be encoded."""

    course: ChatCourse
    indices: Sequence[int]


def open_preview(
    data: DataConfig, settings: PreviewConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> OpenedData:
    """Read and check every record, and draw those to be looked at.

    Raises:
        DataError: a record will not do, or the chat template does not mark the assistant's words.
    """
    template = training_template(tokenizer)
    encoder = ChatEncoder(tokenizer, template, data.max_length_tokens, data.system_prompt)
    chats = open_conversations(data, turn_rules(tokenizer, template))
    num_examined = min(settings.max_conversations, len(chats))
    indices = random.Random(f"{seed} preview").sample(range(len(chats)), num_examined)
    return OpenedData(ChatCourse(chats, encoder, cuts_long(data)), indices)


def preview(
    opened: OpenedData, num_examples: int, on_conversations: Callable[[int], None]
) -> PreviewResult:
    """Encode the conversations and count what becomes of them.

    Raises:
        DataError: none of them gives a row.
    """
    course, encoder = opened.course, opened.course.encoder
    outcomes: list[Encoded] = []
    num_before = 0
    for outcome in course.outcomes(opened.indices):
        outcomes.append(outcome)
        on_conversations(course.num_used - num_before)
        num_before = course.num_used
    kept = [(one.row, one.num_cut_tokens) for one in outcomes if one.row is not None]
    if not kept:
        raise course.nothing_left("examined")
    rows, chats = [row for row, _ in kept], course.chats
    dense = list(packed(rows, encoder.max_length))
    return PreviewResult(
        name=chats.name,
        format=chats.format,
        licence=chats.licence,
        conversations=len(chats),
        examined=course.num_used,
        rows=len(rows),
        tokens=sum(len(row.input_ids) for row in rows),
        trained_tokens=sum(row.num_scored_tokens for row in rows),
        max_length_tokens=encoder.max_length,
        cut_rows=course.num_cut,
        cut_tokens=course.num_cut_tokens,
        dropped=dict(chats.dropped) | dict(course.dropped),
        padding_share=count(rows, encoder.max_length)["padding_share"],
        packed_padding_share=count(dense, encoder.max_length)["padding_share"],
        lengths=_histogram([one.num_tokens for one in outcomes if one.num_tokens]),
        examples=[_example(row, cut, encoder.tokenizer) for row, cut in kept[:num_examples]],
    )


def _histogram(lengths: Sequence[int]) -> list[LengthBin]:
    """Bins that end at powers of two and half way between them."""
    bins: list[LengthBin] = []
    first, last = 1, _SHORTEST_BIN_TOKENS
    while first <= max(lengths):
        bins.append(LengthBin(first, last, sum(first <= length <= last for length in lengths)))
        is_power = last & (last - 1) == 0
        first, last = last + 1, last * 3 // 2 if is_power else last * 4 // 3
    while not bins[0].count:
        bins.pop(0)
    return bins


def _example(row: Row, num_cut: int, tokenizer: PreTrainedTokenizerBase) -> PreviewExample:
    return PreviewExample(
        pieces=list(_pieces(row, tokenizer)),
        tokens=len(row.input_ids),
        trained_tokens=row.num_scored_tokens,
        cut_tokens=num_cut,
    )


def _pieces(row: Row, tokenizer: PreTrainedTokenizerBase) -> Iterator[PreviewPiece]:
    """The row's text, cut where the loss begins and ends.

    Decoded from the start each time: alone, a piece could lose a space or half a character.
    """
    end, shown = 0, ""
    for trained, run in groupby(row.labels, key=lambda label: label != IGNORED):
        end += len(list(run))
        text = str(tokenizer.decode(row.input_ids[:end]))
        yield PreviewPiece(text[len(shown) :], trained)
        shown = text
