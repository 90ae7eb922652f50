"""General text: disjoint parts, BOS, full windows."""

import random

import pytest

from qatlora.data.encode import expected_bos
from qatlora.data.rows import IGNORED
from qatlora.data.text import GeneralText, held_out_rows, open_general, replay_rows
from qatlora.errors import DataError


def own_file(tmp_path, text):
    path = tmp_path / "own.txt"
    path.write_text(text, encoding="utf-8")
    return open_general(str(path), locate=None)


@pytest.mark.parametrize("name", ["wiki", "tiny", "code"])
def test_training_and_held_out_part_share_no_document(packages, name):
    text = open_general(name, packages)
    assert text.held_out
    assert not set(text.training) & set(text.held_out)
    assert len(text.training) > 4 * len(text.held_out)


def test_the_marks_between_documents_are_not_part_of_them(packages):
    for name in ("wiki", "tiny"):
        text = open_general(name, packages)
        assert not any("<" in document for document in text.training + text.held_out)


def test_own_file_is_split_by_place_and_copies_stay_in_training(tmp_path):
    paragraphs = [f"paragraph {n}" for n in range(19)]
    text = own_file(tmp_path, "\n\n".join([*paragraphs, "paragraph 0"]))
    assert text.held_out == ["paragraph 18"]
    assert text.licence == "the user's own"


def test_windows_begin_with_bos_exactly_where_the_tokenizer_adds_one(gemma, smol, packages):
    text = open_general("wiki", packages)
    for row in held_out_rows(text, gemma, 32, 200):
        assert row.input_ids.count(gemma.bos_token_id) == 1
        assert row.input_ids[0] == gemma.bos_token_id
    for row in held_out_rows(text, smol, 32, 200):
        assert smol.bos_token_id not in row.input_ids
    assert (expected_bos(gemma), expected_bos(smol)) == (gemma.bos_token_id, None)


def test_every_token_but_the_first_of_a_window_is_scored(tokenizer, packages):
    for row in held_out_rows(open_general("wiki", packages), tokenizer, 48, 300):
        assert row.labels == [IGNORED, *row.input_ids[1:]]
        assert row.source == "general"
        assert row.num_scored_tokens == 47


def test_windows_put_together_again_are_the_text(tokenizer):
    text = GeneralText(
        "t",
        "none",
        ["The fox runs.", "Where? 狐狸"],
        ["You and I.", "Home, where seven old friends eat supper all day."],
    )
    skipped = 0 if expected_bos(tokenizer) is None else 1
    rows = held_out_rows(text, tokenizer, 8, 10_000)
    ids = [token for row in rows for token in row.input_ids[skipped:]]
    assert (
        tokenizer.decode(ids)
        == "You and I.\n\nHome, where seven old friends eat supper all day.\n\n"
    )


def test_held_out_rows_stay_within_the_tokens_asked_for(tokenizer, packages):
    rows = held_out_rows(open_general("wiki", packages), tokenizer, 32, 100)
    assert sum(row.num_scored_tokens for row in rows) == 93


def test_replay_depends_on_the_seed_and_starts_over_when_used_up(tokenizer, packages):
    text = open_general("wiki", packages)
    once = replay_rows(text, tokenizer, 64, 5, random.Random(1))
    assert once == replay_rows(text, tokenizer, 64, 5, random.Random(1))
    assert once != replay_rows(text, tokenizer, 64, 5, random.Random(2))
    short = GeneralText("t", "none", ["The fox runs home to eat supper. " * 9], ["x"])
    rows = replay_rows(short, tokenizer, 64, 40, random.Random(1))
    assert [len(row.input_ids) for row in rows] == [64] * 40
    assert replay_rows(text, tokenizer, 64, 0, random.Random(1)) == []


def test_text_that_fills_no_window_or_cannot_be_scored_is_refused(gemma):
    text = GeneralText("own.txt", "none", ["short"], ["x"])
    with pytest.raises(DataError, match=r"own\.txt does not fill one row of 64 tokens"):
        replay_rows(text, gemma, 64, 1, random.Random(1))
    with pytest.raises(DataError, match=r"held-out tenth of the general text own\.txt has"):
        held_out_rows(text, gemma, 64, 100)


def test_missing_binary_and_tiny_files_are_refused_by_name(tmp_path, packages):
    with pytest.raises(DataError, match=r"'wikki' cannot be read.*wiki, c4"):
        open_general("wikki", packages)
    with pytest.raises(DataError, match=r"own\.txt has 1 documents or paragraphs, too few"):
        own_file(tmp_path, "one paragraph")
    (tmp_path / "own.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match=r"own\.txt is not UTF-8 \(byte 0\)"):
        open_general(str(tmp_path / "own.txt"), packages)
    with pytest.raises(DataError, match=r"c4\.utf8' cannot be read: No such file"):
        open_general("c4", packages)
