"""The tiny checkpoints that other tests build on are ordinary ones."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TEXT = "The quick fox  runs home — ¿où? 狐狸 🦊\n\tx = 1"


@pytest.fixture(params=["tiny_gemma3_folder", "tiny_llama_folder"])
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


def test_any_text_survives_the_tokenizer(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    token_ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert tokenizer.decode(token_ids) == TEXT


def test_every_token_has_an_embedding_and_widths_are_multiples_of_32(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
    assert len(tokenizer) == model.config.vocab_size
    linears = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    assert all(linear.in_features % 32 == 0 for linear in linears)
    assert model.dtype is torch.bfloat16


def test_chat_template_marks_the_assistants_words(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    messages = [
        {"role": "user", "content": "where is it?"},
        {"role": "assistant", "content": "home with seven friends"},
    ]
    rendered = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True
    )
    marks = rendered["assistant_masks"]
    marked = [token for token, mark in zip(rendered["input_ids"], marks, strict=True) if mark]
    assert tokenizer.decode(marked).startswith("home with seven friends")


def test_the_model_distinguishes_tokens(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    logits = model(**tokenizer(TEXT, return_tensors="pt")).logits
    assert logits.std(dim=-1).min() > 0.1
