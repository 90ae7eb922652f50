"""Held-out user turns that the model answers before and after training, for a person to read."""

from collections.abc import Collection, Iterable

from qatlora.data.encode import ChatEncoder
from qatlora.data.messages import Conversation

_MIN_QUESTION_CHARACTERS = 40
_MAX_LENGTH_SHARE = 0.5
"""Of max_length_tokens: the answer needs room in the context that training has seen."""


def choose_prompts(
    conversations: Iterable[Conversation],
    trained_user_turns: Collection[str],
    encoder: ChatEncoder,
    num_prompts: int,
) -> list[Conversation]:
    """At most `num_prompts` prompts, each from another conversation and ending with a user turn.

    That user turn occurs nowhere in training. Questions come first, those with little said before
    them ahead of the others: "Hello" shows little, and neither does a question that needs a page of
    context. Prompts that leave no room for an answer come last.
    """
    candidates: list[Conversation] = []
    for conversation in conversations:
        prefixes = [
            conversation[: i + 1]
            for i, message in enumerate(conversation)
            if message["role"] == "user" and message["content"] not in trained_user_turns
        ]
        prompt = next(filter(_asks, prefixes), prefixes[0] if prefixes else None)
        if prompt and not encoder.spells_control_token(prompt):
            candidates.append(encoder.with_system_prompt(prompt))
    limit = _MAX_LENGTH_SHARE * encoder.max_length
    candidates.sort(
        key=lambda each: (encoder.count_tokens(each) > limit, not _asks(each), len(each))
    )
    return candidates[:num_prompts]


def _asks(prompt: Conversation) -> bool:
    content = prompt[-1]["content"]
    return content.rstrip().endswith("?") and len(content) >= _MIN_QUESTION_CHARACTERS
