"""The preview: its counts are those of the rows that training gets, its marks those of the loss."""

from itertools import groupby

import pytest
from data_samples import talk, write_jsonl

from qatlora.config import DataConfig, DataKind, PreviewConfig
from qatlora.data.encode import CONTROL_TOKEN, NO_ANSWER_FITS
from qatlora.data.preview import open_preview, preview
from qatlora.errors import DataError


def previewed(tokenizer, path, max_length=200, num_examples=2, max_conversations=100):
    data = DataConfig(kind=DataKind.jsonl, path=str(path), max_length_tokens=max_length)
    settings = PreviewConfig(max_conversations=max_conversations)
    opened = open_preview(data, settings, tokenizer, seed=1)
    done: list[int] = []
    result = preview(opened, num_examples, done.append)
    assert sum(done) == result.examined
    return result


@pytest.fixture
def chats(tmp_path):
    forged = talk("<end_of_turn><|im_end|>", "no")
    late = talk("seven old friends eat. " * 40, "yes")
    long = talk("Hi", "Hello", "and?", "seven old friends eat. " * 40)
    short = [talk(f"fox {n}?", f"dog {n}") for n in range(20)]
    return write_jsonl(tmp_path / "chats.jsonl", [forged, late, long, *short])


def test_what_is_cut_or_left_out_is_counted_with_its_reason(tokenizer, chats):
    result = previewed(tokenizer, chats)
    assert (result.conversations, result.examined, result.rows) == (23, 23, 21)
    assert result.dropped == {CONTROL_TOKEN: 1, NO_ANSWER_FITS: 1}
    assert result.cut_rows == 1
    assert result.cut_tokens > 0
    assert result.packed_padding_share < result.padding_share
    assert 0 < result.trained_tokens < result.tokens


def test_the_histogram_counts_whole_conversations_without_gaps(tokenizer, chats):
    result = previewed(tokenizer, chats)
    assert sum(one.count for one in result.lengths) == 22  # all that were rendered
    assert result.lengths[0].count
    assert result.lengths[-1].count
    assert result.lengths[-1].first > result.max_length_tokens
    firsts = [one.first for one in result.lengths[1:]]
    assert firsts == [one.last + 1 for one in result.lengths[:-1]]


def test_an_example_is_the_rows_text_cut_where_the_loss_begins_and_ends(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "one.jsonl", [talk("Hi", " Ünï 🦊", "x", "y")])
    [example] = previewed(tokenizer, path, max_length=256, num_examples=5).examples
    text = "".join(piece.text for piece in example.pieces)
    rendered = tokenizer.apply_chat_template(talk("Hi", " Ünï 🦊", "x", "y"), tokenize=False)
    assert text == rendered.removesuffix("\n")
    trained = [piece.text for piece in example.pieces if piece.trained]
    end = "<|im_end|>" if "im_end" in tokenizer.chat_template else "<end_of_turn>"
    assert [each.strip() for each in trained] == [f"Ünï 🦊{end}", f"y{end}"]
    assert len(list(groupby(piece.trained for piece in example.pieces))) == len(example.pieces)


def test_no_more_is_rendered_than_asked_for(tokenizer, chats):
    result = previewed(tokenizer, chats, max_conversations=9, num_examples=0)
    assert (result.examined, result.conversations, result.examples) == (9, 23, [])


def test_nothing_to_show_is_an_error_with_the_reasons(tokenizer, chats):
    with pytest.raises(DataError, match=r"No examined conversation .*max_length_tokens: 2"):
        previewed(tokenizer, chats, max_length=8)
