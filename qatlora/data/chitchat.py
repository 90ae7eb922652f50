"""The default conversations: people chatting, from the package `chitchat-dataset`.

7,168 conversations of the BYU Chit-Chat Challenge (2018, MIT licence; W. Myers, T. Etchart and
N. Fulda, "Conversational Scaffolding", 2020). Two people talk about a given topic; whoever speaks
first becomes the user, the other the assistant, and what one of them sends in a row becomes one
turn, a line per message. They are casual, misspelt and often silly: a domain of their own, which is
what makes them good for showing that a fine-tune survives the export. They are no instructions.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from qatlora.data.messages import Conversation, conversation_digest
from qatlora.errors import DataError

MIN_TURNS = 8
MAX_TURN_CHARACTERS = 1000
MIN_RATING = 4

_ROLES = ("user", "assistant")
_LINK_OR_ADDRESS = re.compile(r"https?://|www\.|\S@\S+\.[a-z]")
_TELEPHONE = re.compile(r"\d{3}[-. )]{0,2}\d{3}[-. ]?\d{4}")


@dataclass(frozen=True)
class ChitChat:
    """The conversations that passed the filters, ordered by their ids (see `chats.Chats`)."""

    conversations: list[Conversation]
    digests: list[int]
    dropped: dict[str, int]
    name: str = "chitchat-dataset (Chit-Chat Challenge of Brigham Young University, 2018)"
    licence: str = "MIT"
    format: str = "chitchat-dataset"

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.conversations)

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`."""
        return self.conversations[index]


def open_chitchat(folder: Path) -> ChitChat:
    """Read and filter the package's conversations.

    Args:
        folder: where the package's files are (`qatlora.registry.locate`).

    Raises:
        DataError: the file is absent or not what the package publishes.
    """
    path = folder / "chitchat_dataset" / "dataset.json"
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
        return _filtered(records[key] for key in sorted(records))
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not the file that chitchat-dataset publishes ({error!r}). Remove "
            "what is left of the package, so that it is fetched again."
        ) from error


def _filtered(records: Iterable[dict[str, Any]]) -> ChitChat:
    dropped: Counter[str] = Counter()
    kept: list[Conversation] = []
    for record in records:
        turns = ["\n".join(_lines(turn)) for turn in record["messages"]]
        if reason := _reason_to_drop(record, turns):
            dropped[reason] += 1
            continue
        kept.append([{"role": _ROLES[i % 2], "content": turn} for i, turn in enumerate(turns)])
    for conversation in kept:
        if conversation[-1]["role"] == "user":
            conversation.pop()
    return ChitChat(kept, [conversation_digest(each) for each in kept], dict(dropped))


def _lines(turn: list[dict[str, str]]) -> Iterable[str]:
    return (text for message in turn if (text := message["text"].strip()))


def _reason_to_drop(record: dict[str, Any], turns: list[str]) -> str | None:
    speakers = [{message["sender"] for message in turn} for turn in record["messages"]]
    ratings = record.get("ratings") or {}
    if len(set().union(*speakers)) != 2:
        return "not two speakers"
    if len(turns) < MIN_TURNS:
        return f"fewer than {MIN_TURNS} turns"
    if speakers != [speakers[i % 2] for i in range(len(turns))] or max(map(len, speakers)) > 1:
        return "speakers do not alternate"
    if ratings and mean(float(value) for value in ratings.values()) < MIN_RATING:
        return f"rated below {MIN_RATING} of 10"
    if max(map(len, turns)) > MAX_TURN_CHARACTERS:
        return f"a turn of more than {MAX_TURN_CHARACTERS} characters (pasted text)"
    if not all(turns):
        return "an empty turn"
    if any(map(_holds_contact, turns)):
        return "a link, an e-mail address or a telephone number"
    return None


def _holds_contact(turn: str) -> bool:
    text = turn.lower()
    # The substrings are looked for first because they are rare, and fast to find.
    suspicious = any(mark in text for mark in ("http", "www.", "@"))
    return bool((suspicious and _LINK_OR_ADDRESS.search(text)) or _TELEPHONE.search(text))
