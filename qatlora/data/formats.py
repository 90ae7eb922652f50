"""The ways in which people lay out conversations, each turned into one list of messages.

| format | columns |
|---|---|
| messages | `messages`: role and content |
| sharegpt | `conversations`: from (human, gpt, ..) and value |
| alpaca | `instruction` and `output`; `input` and `system` if need be |
| prompt_completion | `prompt` and `completion`, each a text or a list of messages |

`tools` may stand beside the columns of each. Other columns are not read.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qatlora.config import ChatFormat
from qatlora.data.messages import (
    MESSAGES_EXAMPLE,
    Conversation,
    Place,
    checked_conversation,
    json_kind,
    parsed,
    shortened,
)

_SPEAKERS = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "assistant",
    "observation": "tool",
    "tool": "tool",
}


@dataclass(frozen=True)
class _Layout:
    """Required and further columns, a record as it should be, and what makes messages of it."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    example: str
    messages: Callable[[dict[str, Any], Place], list[Any]]


def detected_format(record: Any, place: Place) -> ChatFormat:
    """The format whose columns the first record of a set has.

    Raises:
        DataError: it has those of none, or of several.
    """
    columns = _object(record, place)
    found = [name for name, layout in _LAYOUTS.items() if set(layout.required) <= columns.keys()]
    if len(found) == 1:
        return found[0]
    known = "; ".join(f"{name.name}: {layout.example}" for name, layout in _LAYOUTS.items())
    if not found:
        place.refuse(
            f"columns of no known format ({_listed(columns)})",
            f"Known are {known}. Rename the columns, or set data.format if one is only missing.",
        )
    names = ", ".join(name.name for name in found)
    place.refuse(
        f"columns of several formats, {names} ({_listed(columns)})",
        f"Say which is meant: data.format={'|'.join(name.name for name in found)}.",
    )


def conversation_of(record: Any, chat_format: ChatFormat, place: Place) -> Conversation:
    """A record as a checked conversation.

    Raises:
        DataError: a column is missing, or what stands in it will not do.
    """
    columns = _object(record, place)
    messages = _LAYOUTS[chat_format].messages(columns, place)
    return checked_conversation(messages, columns.get("tools"), place)


def _from_messages(record: dict[str, Any], place: Place) -> list[Any]:
    messages = record.get("messages")
    if not isinstance(messages, list) or not messages:
        place.refuse(f"no list 'messages' ({_listed(record)})", f"Write {MESSAGES_EXAMPLE}.")
    return messages


def _from_sharegpt(record: dict[str, Any], place: Place) -> list[Any]:
    turns = record.get("conversations")
    if not isinstance(turns, list) or not turns:
        place.refuse(f"no list 'conversations' ({_listed(record)})", f"Write {_SHAREGPT}.")
    system = _system(record, place)
    return system + [_spoken(turn, number, place) for number, turn in enumerate(turns, 1)]


def _spoken(turn: Any, number: int, place: Place) -> Any:
    """A turn of ShareGPT as a message; a `function_call` is the JSON text of a call."""
    if not isinstance(turn, dict):
        return turn  # refused as a message, with its number
    speaker, value = turn.get("from"), turn.get("value")
    if not isinstance(speaker, str) or speaker not in _SPEAKERS:
        found = f"the unknown speaker {shortened(repr(speaker))}" if "from" in turn else "no 'from'"
        place.refuse(
            f"turn {number} has {found}",
            f"Allowed are {', '.join(_SPEAKERS)}. If the turns have 'role' and 'content', call the "
            "column 'messages'.",
        )
    if speaker == "function_call":
        calls = parsed(value) if isinstance(value, str) else value
        calls = calls if isinstance(calls, list) else [calls]
        return {"role": "assistant", "content": None, "tool_calls": calls}
    return {"role": _SPEAKERS[speaker]} | ({"content": value} if "value" in turn else {})


def _from_alpaca(record: dict[str, Any], place: Place) -> list[Any]:
    if record.get("history"):
        place.refuse(
            "a 'history', which would be lost", f"Write earlier turns as {MESSAGES_EXAMPLE}."
        )
    texts = {name: record.get(name) for name in ("instruction", "input", "output")}
    for name, text in texts.items():
        if not isinstance(text, str) and not (name == "input" and text is None):
            found = f"a JSON {json_kind(text)} as '{name}'" if name in record else f"no '{name}'"
            place.refuse(f"{found} ({_listed(record)})", f"Write {_ALPACA}.")
    question = [texts["instruction"], texts["input"]]
    asked = "\n\n".join(text for text in question if text and text.strip())
    return [
        *_system(record, place),
        {"role": "user", "content": asked},
        {"role": "assistant", "content": texts["output"]},
    ]


def _from_prompt_completion(record: dict[str, Any], place: Place) -> list[Any]:
    turns: list[Any] = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        part = record.get(name)
        if isinstance(part, str):
            turns.append({"role": role, "content": part})
        elif isinstance(part, list) and part:
            turns += part
        else:
            found = f"a JSON {json_kind(part)} as '{name}'" if name in record else f"no '{name}'"
            place.refuse(
                f"{found} ({_listed(record)})", f"Give a text or a list of messages: {_PROMPT}."
            )
    return turns


def _system(record: dict[str, Any], place: Place) -> list[Any]:
    text = record.get("system")
    if text is None or (isinstance(text, str) and not text.strip()):
        return []
    if not isinstance(text, str):
        place.refuse(f"a JSON {json_kind(text)} as 'system'", "'system' must be a string.")
    return [{"role": "system", "content": text}]


def _object(record: Any, place: Place) -> dict[str, Any]:
    if not isinstance(record, dict):
        remedy = f"Write {MESSAGES_EXAMPLE}."
        if isinstance(record, list):
            remedy += " A file that is one JSON list is read by data=files."
        place.refuse(f"a JSON {json_kind(record)} where an object is needed", remedy)
    return record


def _listed(columns: Iterable[str]) -> str:
    names = ", ".join(repr(name) for name in list(columns)[:6]) or "none"
    return f"the object's keys: {shortened(names)}"


_SHAREGPT = (
    '{"conversations": [{"from": "human", "value": "..."}, {"from": "gpt", "value": "..."}]}'
)
_ALPACA = '{"instruction": "...", "input": "...", "output": "..."}'
_PROMPT = '{"prompt": "...", "completion": "..."}'
_LAYOUTS = {
    ChatFormat.messages: _Layout(("messages",), (), MESSAGES_EXAMPLE, _from_messages),
    ChatFormat.sharegpt: _Layout(("conversations",), ("system",), _SHAREGPT, _from_sharegpt),
    ChatFormat.alpaca: _Layout(
        ("instruction", "output"), ("input", "system", "history"), _ALPACA, _from_alpaca
    ),
    ChatFormat.prompt_completion: _Layout(
        ("prompt", "completion"), (), _PROMPT, _from_prompt_completion
    ),
}
COLUMNS = frozenset(
    ("tools", *(name for one in _LAYOUTS.values() for name in (*one.required, *one.optional)))
)
"""Every column that a format reads; the others of a table are left on the disk."""
