"""The data of a run: mixture, disjoint parts, determinism, figures."""

import json

import pytest
from data_samples import talk, write_jsonl

from qatlora import registry
from qatlora.config import DataConfig, DataKind
from qatlora.data.load import load_data
from qatlora.data.rows import IGNORED
from qatlora.errors import ConfigError, DataError


@pytest.fixture(autouse=True)
def embedded(monkeypatch, packages):
    monkeypatch.setattr(registry, "locate", packages)


def loaded(tokenizer, seed=0, max_steps=6, rows_per_step=3, **settings):
    defaults = {"max_length_tokens": 192, "eval_tokens": 400, "eval_rows": 4}
    config = DataConfig(**(defaults | settings))
    return load_data(config, tokenizer, seed, max_steps, rows_per_step)


def own_chats(tmp_path, num=30, **settings):
    conversations = [
        talk(f"where did old friend number {n} eat his warm supper?", f"friend {n} ran home")
        for n in range(num)
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", conversations)
    return {"kind": DataKind.jsonl, "path": str(path), **settings}


def test_every_step_has_the_same_number_of_general_rows(tokenizer):
    batches = loaded(tokenizer, max_steps=6, rows_per_step=3, replay_rows_per_step=1)
    assert [row.source for row in batches.train] == ["chat", "chat", "general"] * 6
    without = loaded(tokenizer, max_steps=6, rows_per_step=3, replay_rows_per_step=0)
    assert {row.source for row in without.train} == {"chat"}


def test_every_row_fits_and_trains_something(tokenizer):
    batches = loaded(tokenizer)
    for row in batches.train + [row for text in batches.texts for row in text.rows]:
        assert len(row.input_ids) == len(row.labels) <= 192
        assert row.num_scored_tokens > 0
        assert row.labels[0] == IGNORED


def test_same_seed_gives_the_same_data_and_another_seed_the_same_held_out_texts(tokenizer):
    first, again, other = loaded(tokenizer), loaded(tokenizer), loaded(tokenizer, seed=1)
    assert first == again
    assert first.train != other.train
    assert first.texts == other.texts


def test_no_held_out_conversation_is_trained_on(gemma, tmp_path):
    batches = loaded(gemma, max_steps=40, **own_chats(tmp_path))
    trained = {tuple(row.input_ids) for row in batches.train}
    assert len(trained) > 20
    assert not any(tuple(row.input_ids) in trained for row in batches.texts[0].rows)
    assert batches.notes["chats"]["held_out"] == 3
    assert batches.notes["chats"]["epochs"] > 1


def test_copies_of_a_conversation_are_on_one_side(gemma, tmp_path):
    settings = own_chats(tmp_path)
    path = tmp_path / "chats.jsonl"
    path.write_text(path.read_text() * 3)
    batches = loaded(gemma, max_steps=60, **settings)
    trained = {tuple(row.input_ids) for row in batches.train}
    held_out = [tuple(row.input_ids) for row in batches.texts[0].rows]
    assert len(set(held_out)) == len(held_out) == 3
    assert not trained & set(held_out)


def test_prompts_end_with_a_user_turn_that_training_has_not_seen(tokenizer):
    batches = loaded(tokenizer, max_steps=12, max_length_tokens=512)
    trained = " ".join(tokenizer.decode(row.input_ids) for row in batches.train)
    assert len(batches.prompts) == 3
    for prompt in batches.prompts:
        assert prompt[-1]["role"] == "user"
        assert prompt[-1]["content"] not in trained


def test_prompts_carry_the_system_prompt(gemma, tmp_path):
    batches = loaded(gemma, **own_chats(tmp_path, system_prompt="Be old.", num_prompts=2))
    assert [len(prompt) for prompt in batches.prompts] == [2, 2]
    assert batches.prompts[0][0] == {"role": "system", "content": "Be old."}


def test_notes_are_json_and_count_what_is_there(tokenizer):
    batches = loaded(tokenizer)
    notes = json.loads(json.dumps(batches.notes))
    assert notes["chats"]["licence"] == "MIT"
    assert notes["general"]["name"].startswith("wiki")
    assert notes["train"]["rows"] == len(batches.train) == 18
    assert notes["train"]["tokens"] == sum(len(row.input_ids) for row in batches.train)
    assert [text.name for text in batches.texts] == list(notes["held_out"]) == ["task", "general"]
    assert notes["held_out"]["general"]["scored_tokens"] <= 400


def test_too_few_conversations_to_hold_any_out_are_refused(gemma, tmp_path):
    with pytest.raises(DataError, match=r"chats\.jsonl has 7 different conversations.*at least 8"):
        loaded(gemma, **own_chats(tmp_path, num=7))
    assert loaded(gemma, **own_chats(tmp_path, num=8)).notes["chats"]["held_out"] == 1


def test_conversations_none_of_which_fits_are_refused_with_the_reason(gemma, tmp_path):
    settings = own_chats(tmp_path, max_length_tokens=16)
    with pytest.raises(DataError, match=r"max_length_tokens: \d+\).*\(it is 16\)"):
        loaded(gemma, **settings)


def test_a_bad_line_stops_before_anything_else(gemma, tmp_path):
    settings = own_chats(tmp_path)
    with (tmp_path / "chats.jsonl").open("a") as file:
        file.write("{}\n")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 31"):
        loaded(gemma, **settings)


def test_settings_that_leave_no_room_for_chats_are_refused(gemma):
    with pytest.raises(ConfigError, match="no room for a conversation"):
        loaded(gemma, rows_per_step=2, replay_rows_per_step=2)
    with pytest.raises(ConfigError, match=r"without data\.path"):
        loaded(gemma, kind=DataKind.jsonl)
