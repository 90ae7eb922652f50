"""Conversations from a JSONL file: one `{"messages": [{"role", "content"}, ...]}` per line.

Two passes, so that a file of gigabytes is neither held in memory nor found broken after an hour of
training: the first reads every line, checks it and keeps 24 bytes of it (its number, where it
begins and a digest of what it says); the second reads single conversations by seeking, when they
are needed.
"""

import hashlib
import json
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, Protocol

from qatlora.data.templates import TurnRules
from qatlora.errors import DataError

Message = dict[str, str]
Conversation = list[Message]

ROLES = ("system", "user", "assistant")

_MAX_LINE_BYTES = 64 << 20
_EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)


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
class ChatFile:
    """A checked JSONL file (see `Chats`); conversations are read from disk when asked for."""

    path: Path
    offsets: "array[int]"
    digests: "array[int]"
    line_numbers: "array[int]"
    licence: str = "the user's own"
    dropped: dict[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    def __len__(self) -> int:
        """Number of conversations."""
        return len(self.offsets)

    def __getitem__(self, index: int) -> Conversation:
        """Read conversation `index` again.

        Raises:
            DataError: the file has changed since it was checked.
        """
        place = _Place(self.path, self.line_numbers[index])
        with _open(self.path) as handle:
            handle.seek(self.offsets[index])
            conversation = _messages(handle.readline(_MAX_LINE_BYTES), place)
        if conversation_digest(conversation) != self.digests[index]:
            place.refuse(
                "this conversation is not what it was when the file was checked",
                "Do not write to the file while it is in use.",
            )
        return conversation


def open_chats(path: Path, rules: TurnRules) -> ChatFile:
    """Check every line of a JSONL file; empty lines are passed over.

    Args:
        path: the file.
        rules: which orders of roles the chat template renders.

    Raises:
        DataError: the first thing that is wrong, with file and line number.
    """
    chats = ChatFile(path, array("Q"), array("Q"), array("Q"))
    with _open(path) as handle:
        for place, offset, line in _lines(handle, path):
            conversation = _messages(line, place)
            _check_order(conversation, rules, place)
            chats.offsets.append(offset)
            chats.digests.append(conversation_digest(conversation))
            chats.line_numbers.append(place.line_number)
    if not chats:
        raise DataError(
            f"{path} holds no conversation. Each line must be one JSON object like {_EXAMPLE}."
        )
    return chats


@dataclass(frozen=True)
class _Place:
    path: Path
    line_number: int

    def refuse(self, found: str, remedy: str) -> NoReturn:
        raise DataError(f"{self.path}, line {self.line_number}: {found}. {remedy}")


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The conversations in {path} cannot be read: {reason}. data.path must name a JSONL "
            f"file whose lines look like {_EXAMPLE}."
        ) from error


def _lines(handle: BinaryIO, path: Path) -> Iterator[tuple[_Place, int, bytes]]:
    offset = 0
    line_number = 0
    while line := handle.readline(_MAX_LINE_BYTES + 1):
        line_number += 1
        place = _Place(path, line_number)
        if len(line) > _MAX_LINE_BYTES:
            place.refuse(
                f"the line is longer than {_MAX_LINE_BYTES >> 20} MiB, so this is hardly JSONL",
                "Write one conversation per line.",
            )
        if line.strip():
            yield place, offset, line
        offset += len(line)


def _messages(line: bytes, place: _Place) -> Conversation:
    """Checked messages of one line, up to its last assistant turn."""
    record = _parse(line, place)
    if not isinstance(record, dict):
        place.refuse(f"a JSON {_kind(record)} where an object is needed", f"Write {_EXAMPLE}.")
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        keys = ", ".join(repr(key) for key in list(record)[:6]) or "none"
        place.refuse(
            f"no list 'messages' (the object's keys: {_shortened(keys)})", f"Write {_EXAMPLE}."
        )
    conversation = [_message(raw, number, place) for number, raw in enumerate(messages, 1)]
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()  # nobody answers these: nothing in them is trained
    if not conversation:
        place.refuse(
            "no message with the role 'assistant'",
            "The loss is on the assistant's words, so each conversation needs at least one; "
            "remove the line or add the answer.",
        )
    return conversation


def _parse(line: bytes, place: _Place) -> Any:
    try:
        text = line.decode("utf-8-sig" if place.line_number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place.refuse(
            f"byte {error.start} is not UTF-8 text",
            "A compressed or binary file must be unpacked, another encoding converted first.",
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place.refuse(
            f"not JSON ({error.msg} at column {error.colno}: {_shortened(text.strip())!r})",
            "Each line must be one whole JSON object; a list over many lines or an indented object "
            f"must be rewritten as {_EXAMPLE}.",
        )
    except (ValueError, RecursionError) as error:  # an endless number; brackets without end
        place.refuse(f"JSON that cannot be read ({_shortened(str(error))})", f"Write {_EXAMPLE}.")


def _message(raw: Any, number: int, place: _Place) -> Message:
    if not isinstance(raw, dict):
        place.refuse(
            f"message {number} is a JSON {_kind(raw)}, not an object", f"Write {_EXAMPLE}."
        )
    role, content = raw.get("role"), raw.get("content")
    if role not in ROLES:
        found = f"the unknown role {_shortened(repr(role))}" if "role" in raw else "no 'role'"
        place.refuse(
            f"message {number} has {found}",
            f"Allowed are {', '.join(ROLES)}; tool calls are not supported.",
        )
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)} - {"text"}
        found = f"parts of the kind {', '.join(map(str, sorted(kinds)))}" if kinds else "a list"
        place.refuse(
            f"message {number} has {found} as content",
            "Only text is trained (a multimodal base keeps its towers, frozen): make 'content' one "
            "string, and leave conversations about images, audio or video out.",
        )
    if not isinstance(content, str):
        found = f"a JSON {_kind(content)} as content" if "content" in raw else "no 'content'"
        place.refuse(f"message {number} has {found}", "'content' must be a string.")
    if not content.strip():
        place.refuse(f"message {number} ({role}) is empty", "Write its text or remove the line.")
    if any("\ud800" <= letter <= "\udfff" for letter in content):
        place.refuse(
            f"message {number} holds half a surrogate pair, which is no character",
            "Write the \\u escapes of an emoji in pairs, or the emoji itself.",
        )
    return {"role": role, "content": content}


def _check_order(conversation: Conversation, rules: TurnRules, place: _Place) -> None:
    roles = [message["role"] for message in conversation]
    if "system" in roles[1:]:
        number = roles.index("system", 1) + 1
        place.refuse(
            f"message {number} is a system message", "A system message must be the first one."
        )
    if roles[0] == "system" and not rules.system:
        place.refuse(
            "a system message, which the base's chat template cannot render",
            "Put its text at the head of the first user message.",
        )
    first = 1 if roles[0] == "system" else 0
    if not rules.alternating:
        return
    for index, role in enumerate(roles[first:], first):
        expected = ("user", "assistant")[(index - first) % 2]
        if role != expected:
            place.refuse(
                f"message {index + 1} has the role {role!r} where {expected!r} is due",
                "The base's chat template renders only turns that alternate, the user first; join "
                "consecutive messages of one role.",
            )


def conversation_digest(conversation: Conversation) -> int:
    """64 bits that depend on roles and words only (blake2b)."""
    said = json.dumps([[message["role"], message["content"]] for message in conversation])
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big")


def _kind(value: Any) -> str:
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def _shortened(text: str, limit: int = 80) -> str:
    return text if len(text) <= limit else text[: limit - 3] + "..."
