"""Several files as one set: weights, what is held out, and what the report says of each."""

import json
from collections import Counter

import pytest
from data_samples import talk, write_jsonl

from qatlora import registry
from qatlora.config import ChatFormat, DataConfig, DataKind
from qatlora.data.load import load_data
from qatlora.errors import DataError


@pytest.fixture(autouse=True)
def embedded(monkeypatch, packages):
    monkeypatch.setattr(registry, "locate", packages)


def write_files(folder, num=40):
    """Conversations with a fox as messages, others with a dog as Alpaca columns."""
    foxes = [talk(f"where did fox {n} eat?", f"fox {n} ran home") for n in range(num)]
    dogs = [{"instruction": f"where is dog {n}?", "output": f"dog {n} ran"} for n in range(num)]
    write_jsonl(folder / "fox.jsonl", foxes)
    (folder / "dog.json").write_text(json.dumps(dogs))
    return str(folder / "fox.jsonl"), str(folder / "dog.json")


def loaded(tokenizer, mix, max_steps=20, **settings):
    defaults = {"max_length_tokens": 192, "eval_tokens": 400, "eval_rows": 8, "num_prompts": 0}
    config = DataConfig(
        kind=DataKind.files, paths=list(mix), weights=list(mix.values()), **(defaults | settings)
    )
    return load_data(config, tokenizer, seed=1, max_steps=max_steps, rows_per_step=4)


def animals(rows, tokenizer):
    decoded = [tokenizer.decode(row.input_ids) for row in rows if row.source == "chat"]
    return ["fox" if "fox" in each else "dog" for each in decoded]


def test_training_rows_come_from_each_file_by_its_weight_spread_evenly(gemma, tmp_path):
    fox, dog = write_files(tmp_path)
    batches = loaded(gemma, {fox: 3.0, dog: 1.0})
    order = animals(batches.train, gemma)
    assert Counter(order) == {"fox": 45, "dog": 15}
    assert all(Counter(order[place : place + 4])["dog"] == 1 for place in range(0, 60, 4))
    files = batches.notes["chats"]["files"]
    assert files[dog] == {"format": "alpaca", "conversations": 40, "weight": 1.0}
    assert batches.notes["chats"]["conversations"] == 80
    assert batches.notes["chats"]["format"] == "messages, alpaca"


def test_a_copy_in_another_file_is_held_out_of_training_too(gemma, tmp_path):
    fox, _ = write_files(tmp_path)
    (tmp_path / "copy.jsonl").write_text((tmp_path / "fox.jsonl").read_text())
    batches = loaded(gemma, {fox: 1.0, str(tmp_path / "copy.jsonl"): 1.0}, max_steps=60)
    trained = {tuple(row.input_ids) for row in batches.train}
    held_out = {tuple(row.input_ids) for row in batches.texts[0].rows}
    assert held_out
    assert not trained & held_out


def test_one_file_in_the_mixture_is_as_one_path(gemma, tmp_path):
    fox, _ = write_files(tmp_path)
    alone = DataConfig(
        kind=DataKind.jsonl, path=fox, max_length_tokens=192, eval_tokens=400, eval_rows=8,
        num_prompts=0,
    )  # fmt: skip
    expected = load_data(alone, gemma, seed=1, max_steps=20, rows_per_step=4)
    assert loaded(gemma, {fox: 2.0}).train == expected.train


def test_a_format_that_is_given_holds_for_every_file(gemma, tmp_path):
    fox, dog = write_files(tmp_path)
    with pytest.raises(DataError, match=r"dog\.json, record 1: no list 'messages'"):
        loaded(gemma, {fox: 1.0, dog: 1.0}, format=ChatFormat.messages)


def test_packed_rows_hold_every_conversation_that_unpacked_ones_hold(gemma, tmp_path):
    fox, dog = write_files(tmp_path)
    mix = {fox: 1.0, dog: 1.0}
    dense = loaded(gemma, mix, max_steps=2, packing=True)
    assert max(len(row.starts) for row in dense.train) > 2
    assert {row.source for row in dense.train if len(row.starts) > 1} == {"chat"}
    sparse = loaded(gemma, mix, max_steps=60)
    single = {tuple(row.input_ids) for row in sparse.train}
    for row in dense.train:
        for start, end in zip(row.starts, (*row.starts[1:], len(row.input_ids)), strict=True):
            assert row.source == "general" or tuple(row.input_ids[start:end]) in single
    held_out = [row for text in dense.texts for row in text.rows]
    assert {row.starts for row in held_out} == {(0,)}
    assert dense.notes["train"]["padding_share"] < sparse.notes["train"]["padding_share"]
