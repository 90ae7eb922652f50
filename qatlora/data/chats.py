"""Sets of conversations: what all of them can do, and the user's own, in files and tables.

Two passes, so that a file of gigabytes is neither held in memory nor found broken after an hour of
training: the first reads every record, checks it and keeps 24 bytes of it (its number, its key and
a digest of what it says); the second reads single conversations when they are needed.
"""

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from qatlora.config import ChatFormat
from qatlora.data.formats import conversation_of, detected_format
from qatlora.data.messages import (
    MESSAGES_EXAMPLE,
    Conversation,
    Place,
    check_order,
    conversation_digest,
)
from qatlora.data.records import Records
from qatlora.data.templates import TurnRules
from qatlora.errors import DataError


class Chats(Protocol):
    """A set of conversations that can be read one by one."""

    @property
    def name(self) -> str:
        """What the report calls the set."""
        ...

    @property
    def licence(self) -> str:
        """Licence of the text."""
        ...

    @property
    def format(self) -> str:
        """How the set is laid out."""
        ...

    @property
    def digests(self) -> Sequence[int]:
        """64 bits per conversation that depend on what is said only; equal for copies."""
        ...

    @property
    def dropped(self) -> dict[str, int]:
        """Reason -> conversations that were left out when the set was opened."""
        ...

    def __len__(self) -> int:
        """Number of conversations."""
        ...

    def __getitem__(self, index: int) -> Conversation:
        """Conversation `index`; every one has an assistant turn and ends with one."""
        ...


@dataclass(frozen=True)
class OwnChats:
    """Checked records (see `Chats`); conversations are read from disk when asked for."""

    records: Records
    chat_format: ChatFormat
    unit: str
    keys: "array[int]" = field(default_factory=lambda: array("Q"))
    digests: "array[int]" = field(default_factory=lambda: array("Q"))
    numbers: "array[int]" = field(default_factory=lambda: array("Q"))
    licence: str = "the user's own"
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's path or the data set's id."""
        return self.records.name

    @property
    def format(self) -> str:
        """Name of the format, as in data.format."""
        return self.chat_format.name

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.keys)

    def __getitem__(self, index: int) -> Conversation:
        """Read conversation `index` again.

        Raises:
            DataError: the file has changed since it was checked.
        """
        place = Place(self.name, self.unit, self.numbers[index])
        record = self.records.read(self.keys[index], place)
        conversation = conversation_of(record, self.chat_format, place)
        if conversation_digest(conversation) != self.digests[index]:
            place.refuse(
                "this conversation is not what it was when the file was checked",
                "Do not write to the file while it is in use.",
            )
        return conversation


def open_chats(
    records: Records, rules: TurnRules, chat_format: ChatFormat = ChatFormat.auto
) -> OwnChats:
    """Check every record.

    Args:
        records: of a file or a table.
        rules: which orders of roles the chat template renders.
        chat_format: how the records are laid out; auto: as the first one shows.

    Raises:
        DataError: the first thing that is wrong, with file and line.
    """
    chats: OwnChats | None = None
    for place, key, record in records.scan():
        if chats is None:
            if chat_format is ChatFormat.auto:
                chat_format = detected_format(record, place)
            chats = OwnChats(records, chat_format, place.unit)
        conversation = conversation_of(record, chats.chat_format, place)
        check_order(conversation, rules, place)
        chats.keys.append(key)
        chats.digests.append(conversation_digest(conversation))
        chats.numbers.append(place.number)
    if chats is None:
        raise DataError(
            f"{records.name} holds no conversation. Each record must be one JSON object like "
            f"{MESSAGES_EXAMPLE}."
        )
    return chats
