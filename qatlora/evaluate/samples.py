"""Greedy answers to held-out prompts, for a person to read before and after."""

from collections.abc import Callable, Sequence

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

_END_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<turn|>")


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, str]]],
    max_new_tokens: int,
    on_answer: Callable[[int], None],
) -> list[str]:
    """Answer each conversation greedily through the tokenizer's chat template.

    Args:
        model: a causal LM with `generate`.
        tokenizer: with a chat template.
        prompts: conversations that end with a user turn.
        max_new_tokens: length limit of an answer.
        on_answer: called with 1 after each answer.
    """
    vocabulary = tokenizer.get_vocab()
    stops = {vocabulary[token] for token in _END_OF_TURN if token in vocabulary}
    stops |= {tokenizer.eos_token_id}
    texts = []
    for prompt in prompts:
        inputs = tokenizer.apply_chat_template(
            prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(next(model.parameters()).device)
        produced = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            eos_token_id=sorted(stops),
            pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
        )
        new = produced[0, inputs["input_ids"].shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
        on_answer(1)
    return texts
