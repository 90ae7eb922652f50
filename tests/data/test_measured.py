"""Texts that models are compared on: what comes first, and thinking off and on."""

import pytest
from data_samples import talk, write_jsonl

from qatlora.config import DataConfig, DataKind
from qatlora.data.measured import measured_texts
from qatlora.data.text import held_out_rows, open_general
from qatlora.errors import DataError


@pytest.fixture(autouse=True)
def _packages(packages, monkeypatch):
    monkeypatch.setattr("qatlora.registry.locate", packages)


@pytest.fixture
def chats(tmp_path) -> DataConfig:
    talks = [talk(f"where is friend {n}?", f"friend {n} runs home") for n in range(20)]
    return DataConfig(kind=DataKind.jsonl, path=str(write_jsonl(tmp_path / "chats.jsonl", talks)))


def test_what_runs_hold_out_comes_first_and_then_the_rest(gemma, packages):
    wiki = open_general("wiki", packages)
    held_out = held_out_rows(wiki, gemma, 32, 10**6)[:-1]  # the last one may not be full
    [short], notes = measured_texts(["wiki"], DataConfig(), gemma, 32, 100)
    assert short.rows == held_out[: len(short.rows)]
    assert sum(row.num_scored_tokens for row in short.rows) <= 100
    assert notes["wiki"]["share_of_held_out_text"] == 1
    [long], notes = measured_texts(["wiki"], DataConfig(), gemma, 32, 10**6)
    assert long.rows[: len(held_out)] == held_out
    assert 0 < notes["wiki"]["share_of_held_out_text"] < 0.5


def test_conversations_are_scored_on_the_assistants_words(smol, chats):
    [text], _ = measured_texts(["chats"], chats, smol, 160, 10**6)
    assert text.name == "chats"
    assert len(text.rows) == 20
    said = [smol.decode([label for label in row.labels if label >= 0]) for row in text.rows]
    assert sorted(said) == sorted(f"friend {n} runs home<|im_end|>" for n in range(20))


def test_a_template_that_knows_thinking_gives_two_texts(smol, chats, monkeypatch):
    thinking = "{% if enable_thinking %}<|im_start|>system\nthink<|im_end|>\n{% endif %}"
    monkeypatch.setattr(smol, "chat_template", thinking + smol.chat_template)
    texts, notes = measured_texts(["chats"], chats, smol, 160, 10**6)
    off, on = texts
    assert [off.name, on.name] == ["chats, thinking off", "chats, thinking on"] == list(notes)
    for without, with_ in zip(off.rows, on.rows, strict=True):
        assert with_.input_ids[-len(without.input_ids) :] == without.input_ids
        assert smol.decode(with_.input_ids).startswith("<|im_start|>system\nthink")
        assert [label for label in with_.labels if label >= 0] == [
            label for label in without.labels if label >= 0
        ]


def test_a_base_without_a_template_is_told_how_to_measure_without_chats(smol, chats, monkeypatch):
    monkeypatch.setattr(smol, "chat_template", None)
    with pytest.raises(DataError, match="leave chats out of fidelity.texts"):
        measured_texts(["chats"], chats, smol, 64, 100)


def test_two_files_of_one_name_are_refused(smol, tmp_path):
    paths = [tmp_path / folder / "text.txt" for folder in ("a", "b")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("\n\n".join(f"paragraph {n} of many" for n in range(40)))
    with pytest.raises(DataError, match="called text.txt. Rename"):
        measured_texts([str(path) for path in paths], DataConfig(), smol, 32, 100)
