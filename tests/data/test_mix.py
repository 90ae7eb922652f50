"""General texts in one sequence of rows: in proportion, spread evenly, each row whole."""

import random
from collections import Counter

from qatlora.data import load
from qatlora.data.mix import MixedText, mixed_rows
from qatlora.data.text import GeneralText, replay_rows


def text(word: str) -> GeneralText:
    return GeneralText(
        word, "none", [f"{word} {number} runs home to eat. " * 9 for number in range(9)], ["x"]
    )


def sources(rows, tokenizer) -> list[str]:
    decoded = [tokenizer.decode(row.input_ids) for row in rows]
    return ["fox" if "fox" in each else "dog" for each in decoded]


def test_every_prefix_keeps_the_proportion(tokenizer):
    mix = [MixedText("fox", text("fox"), 2.0), MixedText("dog", text("dog"), 1.0)]
    rows = mixed_rows(mix, tokenizer, 64, 30, seed=1)
    order = sources(rows, tokenizer)
    assert Counter(order) == {"fox": 20, "dog": 10}
    for place in range(1, 31):
        assert abs(order[:place].count("dog") - place / 3) < 1
    assert all(len(row.input_ids) == 64 for row in rows)
    assert rows == mixed_rows(mix, tokenizer, 64, 30, seed=1)
    assert rows != mixed_rows(mix, tokenizer, 64, 30, seed=2)


def test_one_text_is_what_it_was_without_a_mixture(smol):
    alone = mixed_rows([MixedText("fox", text("fox"), 1.0)], smol, 64, 12, seed=3)
    assert alone == replay_rows(text("fox"), smol, 64, 12, random.Random("3 general"))


def test_the_settings_mix_texts_and_keep_the_evaluated_one(packages, smol, monkeypatch):
    monkeypatch.setattr(load.registry, "locate", packages)
    settings = load.DataConfig(
        general="wiki", replay_mix={"wiki": 2.0, "code": 1.0}, max_length_tokens=128,
        replay_rows_per_step=3, eval_tokens=200, num_prompts=0,
    )  # fmt: skip
    batches = load.load_data(settings, smol, seed=0, max_steps=4, rows_per_step=4)
    general = [row for row in batches.train if row.source == "general"]
    code = [row for row in general if " = " in smol.decode(row.input_ids)]
    assert (len(general), len(code)) == (12, 4)
    assert batches.notes["replay"] == {"wiki": 2.0, "code": 1.0}
    held_out = smol.decode(batches.texts[1].rows[0].input_ids)
    assert "cold river" in held_out
