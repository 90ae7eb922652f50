"""The embedded data with the tokenizers of the embedded bases (fetched if they are not at hand)."""

import pytest
from data_samples import talk
from transformers import AutoTokenizer

from qatlora.base.unpack import embedded_base
from qatlora.config import DataConfig
from qatlora.data.encode import ChatEncoder, expected_bos
from qatlora.data.load import load_data
from qatlora.data.templates import shipped_template, training_template

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def gemma3_270m():
    tokenizer = AutoTokenizer.from_pretrained(embedded_base("gemma3_270m"))
    tokenizer.chat_template = shipped_template("gemma3")
    return tokenizer


@pytest.fixture(scope="module")
def smollm2_135m():
    return AutoTokenizer.from_pretrained(embedded_base("smollm2_135m"))


def test_smollm2s_own_template_equals_the_shipped_one(smollm2_135m):
    if "generation" not in smollm2_135m.chat_template.replace("add_generation_prompt", ""):
        assert training_template(smollm2_135m) == shipped_template("chatml")


def test_gemma_expects_bos_and_smollm2_does_not(gemma3_270m, smollm2_135m):
    assert expected_bos(gemma3_270m) == gemma3_270m.bos_token_id == 2
    assert expected_bos(smollm2_135m) is None


def test_turn_marks_are_single_tokens_and_the_end_of_turn_is_trained(gemma3_270m):
    encoder = ChatEncoder(gemma3_270m, gemma3_270m.chat_template, 256)
    row = encoder.encode([talk("Hi", "Hello")])[0].row
    assert gemma3_270m.convert_ids_to_tokens(row.input_ids) == [
        *["<bos>", "<start_of_turn>", "user", "\n", "Hi", "<end_of_turn>", "\n"],
        *["<start_of_turn>", "model", "\n", "Hello", "<end_of_turn>"],
    ]
    assert row.num_scored_tokens == 2


@pytest.mark.parametrize("name", ["gemma3_270m", "smollm2_135m"])
def test_default_data_fill_a_short_run(request, name):
    tokenizer = request.getfixturevalue(name)
    batches = load_data(DataConfig(), tokenizer, seed=0, max_steps=40, rows_per_step=2)
    assert [row.source for row in batches.train] == ["chat", "general"] * 40
    assert len(batches.prompts) == 3
    assert batches.notes["train"]["padding_share"] < 0.15
    for text in batches.notes["held_out"].values():
        assert 3500 < text["scored_tokens"] <= 4096
