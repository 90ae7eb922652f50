"""Greedy answers to held-out prompts, for a person to read before and after."""

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

_END_OF_TURN = ("<end_of_turn>", "<|im_end|>", "<turn|>")


@torch.no_grad()
def answers(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[list[dict[str, Any]]],
    max_new_tokens: int,
) -> list[str]:
    """Answer the conversations greedily, all in one batch, through the tokenizer's chat template.

    Args:
        model: a causal LM with `generate`.
        tokenizer: with a chat template.
        prompts: conversations that end with a user turn; the first message may carry `tools`.
        max_new_tokens: length limit of an answer.
    """
    vocabulary = tokenizer.get_vocab()
    stops = {vocabulary[token] for token in _END_OF_TURN if token in vocabulary}
    stops |= {tokenizer.eos_token_id}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    rows = [
        tokenizer.apply_chat_template(
            list(prompt),
            tools=prompt[0].get("tools"),
            add_generation_prompt=True,
            return_dict=True,
        )
        for prompt in prompts
    ]
    inputs = _left_padded([row["input_ids"] for row in rows], pad)
    device = next(model.parameters()).device
    with _contiguous_head(model):
        produced = model.generate(
            **{name: tensor.to(device) for name, tensor in inputs.items()},
            max_new_tokens=max_new_tokens,
            do_sample=False,
            top_k=None,
            top_p=None,
            eos_token_id=sorted(stops),
            pad_token_id=pad,
        )
    new = produced[:, inputs["input_ids"].shape[1] :]
    return [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def _left_padded(rows: Sequence[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.tensor([[pad] * (longest - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@contextlib.contextmanager
def _contiguous_head(model: nn.Module) -> Iterator[None]:
    """Hand lm_head the last position as a tensor of its own.

    As a view of a longer sequence it makes torch's matmul on a CPU copy the head's weight, which
    takes seconds for 262,144 words.
    """
    head = model.get_output_embeddings()
    hook = head.register_forward_pre_hook(lambda _, inputs: (inputs[0].contiguous(),))
    try:
        yield
    finally:
        hook.remove()
