"""Texts to compare models on; nothing of them is trained.

What other runs hold out comes first, the rest of the text after it, so that a short measurement
sees hardly a word that an adapter of ours was trained on, and a long one has enough of them.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from qatlora import registry
from qatlora.config import DataConfig
from qatlora.data.chats import Chats
from qatlora.data.course import ChatCourse
from qatlora.data.encode import ChatEncoder
from qatlora.data.load import count, cuts_long
from qatlora.data.rows import Row, Text, first_rows
from qatlora.data.sources import open_conversations
from qatlora.data.templates import training_template, turn_rules
from qatlora.data.text import open_general, windows
from qatlora.errors import DataError

CHATS = "chats"
"""Name of the text that is made of conversations."""

_THINKING = "enable_thinking"
"""What the templates of reasoning models are told, Gemma 4's and Qwen 3's among them."""


def measured_texts(
    names: Sequence[str],
    data: DataConfig,
    tokenizer: PreTrainedTokenizerBase,
    window_tokens: int,
    num_tokens: int,
) -> tuple[list[Text], dict[str, Any]]:
    """Windows of each text, each with BOS in front, and notes for the report.

    Args:
        names: `chats`, names of general texts, or paths of text files.
        data: where the conversations come from.
        tokenizer: of all models.
        window_tokens: length of a window.
        num_tokens: scored tokens of each text at most.

    Raises:
        DataError: a text is missing or too short, or the chat template will not do.
    """
    texts, notes = [], {}
    for name in names:
        if name == CHATS:
            found, about = _chat_texts(data, tokenizer, window_tokens, num_tokens)
        else:
            found, about = _general_text(name, tokenizer, window_tokens, num_tokens)
        for text in found:
            _require_tokens(text)
            if text.name in notes:
                raise DataError(
                    f"Two of fidelity.texts={list(names)} are called {text.name}. Rename a file."
                )
            notes[text.name] = about | count(text.rows, window_tokens)
        texts += found
    return texts, notes


def _general_text(
    name: str, tokenizer: PreTrainedTokenizerBase, window_tokens: int, num_tokens: int
) -> tuple[list[Text], dict[str, Any]]:
    text = open_general(name, registry.locate)
    held_out = first_rows(windows(text.held_out, tokenizer, window_tokens), num_tokens)
    documents = [*text.held_out, *text.training]
    rows = first_rows(windows(documents, tokenizer, window_tokens), num_tokens)
    share = min(1.0, len(held_out) / len(rows))
    about = {"name": text.name, "licence": text.licence, "share_of_held_out_text": round(share, 3)}
    return [Text(Path(name).name, rows)], about


def _chat_texts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, window_tokens: int, num_tokens: int
) -> tuple[list[Text], dict[str, Any]]:
    """The conversations, with thinking off and on where the template makes a difference."""
    try:
        template = training_template(tokenizer)
    except DataError as problem:
        raise DataError(
            f"{problem} Or measure without conversations: leave {CHATS} out of fidelity.texts."
        ) from None
    chats = open_conversations(data, turn_rules(tokenizer, template))

    def rows(**options: bool) -> list[Row]:
        encoder = ChatEncoder(tokenizer, template, window_tokens, data.system_prompt, options)
        course = ChatCourse(chats, encoder, cuts_long(data))
        found = first_rows(course.encoded(list(_held_out_first(chats))), num_tokens)
        if not found:
            raise course.nothing_left("measured", "fidelity.window_tokens")
        return found

    off, on = rows(**{_THINKING: False}), rows(**{_THINKING: True})
    about = {"name": chats.name, "licence": chats.licence}
    if off == on:
        return [Text(CHATS, off)], about
    return [Text(f"{CHATS}, thinking off", off), Text(f"{CHATS}, thinking on", on)], about


def _held_out_first(chats: Chats) -> Iterator[int]:
    """Different conversations by digest: runs hold out those with the smallest ones."""
    places = {digest: index for index, digest in enumerate(chats.digests)}
    return (places[digest] for digest in sorted(places))


def _require_tokens(text: Text) -> None:
    num_scored = sum(row.num_scored_tokens for row in text.rows)
    if num_scored < 2:
        raise DataError(
            f"The text {text.name} has {num_scored} tokens to score, and a standard error needs at "
            "least 2. Give a longer text in fidelity.texts."
        )
