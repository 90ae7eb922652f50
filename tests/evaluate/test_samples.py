"""Greedy answers: a batch of prompts, each answered as if it were alone."""

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from qatlora.evaluate.samples import answers

PROMPTS = [
    [{"role": "user", "content": "The quick brown fox"}],
    [{"role": "user", "content": "Who ran home to eat warm supper with seven old friends?"}],
    [{"role": "user", "content": "Never"}],
]


@pytest.mark.parametrize("folder", ["tiny_gemma3_folder", "tiny_llama_folder"])
def test_an_answer_does_not_depend_on_the_other_prompts(
    folder: str, request: pytest.FixtureRequest
):
    path: Path = request.getfixturevalue(folder)
    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(path)
    together = answers(model, tokenizer, PROMPTS, 8)
    assert together == [answers(model, tokenizer, [prompt], 8)[0] for prompt in PROMPTS]
    assert len(set(together)) > 1


def test_an_answer_is_what_greedy_decoding_gives(tiny_llama_folder: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_llama_folder, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_folder)
    ids = tokenizer.apply_chat_template(PROMPTS[0], add_generation_prompt=True, return_dict=True)[
        "input_ids"
    ]
    with torch.no_grad():
        for _ in range(3):
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert answers(model, tokenizer, PROMPTS[:1], 3) == [
        tokenizer.decode(ids[-3:], skip_special_tokens=True).strip()
    ]
