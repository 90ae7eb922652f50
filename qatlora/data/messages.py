"""One conversation: what its messages may hold, and the order in which they may come.

A conversation is a list of messages, `{"role", "content"}` with role system, user, assistant or
tool. Where functions are called, an assistant's message has `tool_calls` (its content may be empty
then), a tool's message holds the result, and the FIRST message carries the functions' definitions
as `tools`, so that whoever has the conversation has all of it.
"""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from qatlora.data.templates import TurnRules
from qatlora.errors import DataError

Message = dict[str, Any]
Conversation = list[Message]

ROLES = ("system", "user", "assistant", "tool")
MESSAGES_EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}]}'
)
_MAX_DEPTH = 32
_JSON_TYPES = (dict, list, str, bool, int, float)
_CALL_EXAMPLE = '{"type": "function", "function": {"name": "...", "arguments": {...}}}'


@dataclass(frozen=True)
class Place:
    """Where a record stands: file or data set, and its number, counted in `unit` from 1."""

    source: str
    unit: str
    number: int

    def refuse(self, found: str, remedy: str) -> NoReturn:
        """Raise `DataError` with place, finding and remedy."""
        raise DataError(f"{self.source}, {self.unit} {self.number}: {found}. {remedy}")


def checked_conversation(messages: list[Any], tools: Any, place: Place) -> Conversation:
    """The messages up to the last assistant turn, each one checked.

    Args:
        messages: as they stand in the record.
        tools: definitions of functions: a list, the JSON text of one, or None.
        place: for errors.

    Raises:
        DataError: a role, a content or a call will not do, or nobody answers.
    """
    conversation = [_message(raw, number, place) for number, raw in enumerate(messages, 1)]
    while conversation and conversation[-1]["role"] != "assistant":
        conversation.pop()  # nobody answers these: nothing in them is trained
    if not conversation:
        place.refuse(
            "no message with the role 'assistant'",
            "The loss is on the assistant's words, so each conversation needs at least one; "
            f"remove the {place.unit} or add the answer.",
        )
    definitions = _definitions(tools, place)
    if definitions:
        conversation[0]["tools"] = definitions
    return conversation


def check_order(conversation: Conversation, rules: TurnRules, place: Place) -> None:
    """Refuse what the base's chat template cannot render.

    Raises:
        DataError: a system message out of place, a call where none can be, turns out of order.
    """
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
    _check_calls(conversation, rules, place)
    if rules.alternating:
        _check_alternation(conversation, place)


def tools_of(conversation: Conversation) -> list[Any] | None:
    """Definitions of the functions that may be called in the conversation, if any."""
    tools: list[Any] | None = conversation[0].get("tools")
    return tools


def strings_in(value: Any) -> Iterator[str]:
    """Every text inside a message, its calls and its definitions included, in any order."""
    pending = [value]
    while pending:
        one = pending.pop()
        if isinstance(one, str):
            yield one
        else:
            pending += _members(one)


def conversation_digest(conversation: Conversation) -> int:
    """64 bits that depend on roles, words and calls only (blake2b)."""
    said = [[message["role"], message["content"], *_called(message)] for message in conversation]
    content = json.dumps(said).encode()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "big")


def _called(message: Message) -> list[Any]:
    return [message[key] for key in ("tool_calls", "tools") if key in message]


def json_kind(value: Any) -> str:
    """What JSON calls a value of this type."""
    names = {dict: "object", list: "list", str: "string", bool: "boolean", type(None): "null"}
    return names.get(type(value), "number")


def shortened(text: str, limit: int = 80) -> str:
    """`text`, or its beginning and three dots."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def _message(raw: Any, number: int, place: Place) -> Message:
    if not isinstance(raw, dict):
        place.refuse(
            f"message {number} is a JSON {json_kind(raw)}, not an object",
            f"Write {MESSAGES_EXAMPLE}.",
        )
    role = raw.get("role")
    if role not in ROLES:
        found = f"the unknown role {shortened(repr(role))}" if "role" in raw else "no 'role'"
        place.refuse(f"message {number} has {found}", f"Allowed are {', '.join(ROLES)}.")
    message: Message = {"role": role}
    calls = raw.get("tool_calls") or []
    if calls and role != "assistant":
        place.refuse(
            f"message {number} ({role}) has tool_calls", "Only the assistant calls functions."
        )
    message["content"] = _content(raw, role, number, place, may_be_empty=bool(calls))
    if calls:
        message["tool_calls"] = _calls(calls, number, place)
    if role == "tool":
        message |= {key: raw[key] for key in ("name", "tool_call_id") if _is_text(raw.get(key))}
    if any("\ud800" <= letter <= "\udfff" for text in strings_in(message) for letter in text):
        place.refuse(
            f"message {number} holds half a surrogate pair, which is no character",
            "Write the \\u escapes of an emoji in pairs, or the emoji itself.",
        )
    return message


def _content(
    raw: dict[str, Any], role: str, number: int, place: Place, *, may_be_empty: bool
) -> str:
    content = raw.get("content")
    if content is None and may_be_empty:
        return ""
    if isinstance(content, list):
        kinds = {part.get("type", "text") for part in content if isinstance(part, dict)} - {"text"}
        found = f"parts of the kind {', '.join(map(str, sorted(kinds)))}" if kinds else "a list"
        place.refuse(
            f"message {number} has {found} as content",
            "Only text is trained (a multimodal base keeps its towers, frozen): make 'content' one "
            "string, and leave conversations about images, audio or video out.",
        )
    if not isinstance(content, str):
        found = f"a JSON {json_kind(content)} as content" if "content" in raw else "no 'content'"
        place.refuse(f"message {number} has {found}", "'content' must be a string.")
    if not content.strip() and not may_be_empty:
        place.refuse(
            f"message {number} ({role}) is empty", f"Write its text or remove the {place.unit}."
        )
    return content


def _calls(calls: Any, number: int, place: Place) -> list[dict[str, Any]]:
    """Calls in the one shape that chat templates read: arguments as an object."""
    if not isinstance(calls, list):
        place.refuse(
            f"message {number} has a JSON {json_kind(calls)} as tool_calls",
            f"Write a list of {_CALL_EXAMPLE}.",
        )
    return [_call(call, number, place) for call in calls]


def _call(call: Any, number: int, place: Place) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not _is_text(function.get("name")):
        place.refuse(
            f"message {number} has a tool call without a function's name", f"Write {_CALL_EXAMPLE}."
        )
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        arguments = parsed(arguments or "{}")
    if not isinstance(arguments, dict) or not _is_plain(arguments):
        place.refuse(
            f"message {number} calls {shortened(function['name'])!r} with arguments that are no "
            f"JSON object of at most {_MAX_DEPTH} levels",
            f"Write {_CALL_EXAMPLE}.",
        )
    normal = {"type": "function", "function": {"name": function["name"], "arguments": arguments}}
    return normal | ({"id": call["id"]} if _is_text(call.get("id")) else {})


def _definitions(tools: Any, place: Place) -> list[Any]:
    definitions = parsed(tools or "[]") if isinstance(tools, str) else tools or []
    whole = isinstance(definitions, list) and _is_plain(definitions)
    if not whole or not all(isinstance(one, dict) for one in definitions):
        place.refuse(
            "'tools' is neither a list of objects nor the JSON text of one",
            "Give the JSON schemas of the functions, or leave 'tools' out.",
        )
    return definitions


def _check_calls(conversation: Conversation, rules: TurnRules, place: Place) -> None:
    answers_a_call = False
    for number, message in enumerate(conversation, 1):
        involved = message["role"] == "tool" or "tool_calls" in message or "tools" in message
        if involved and not rules.tools:
            what = "function definitions" if "tools" in message else "tool calls"
            place.refuse(
                f"message {number} has {what}, which the base's chat template cannot render",
                f"Remove the {place.unit}, or use a base (or base.chat_template) for tool calls.",
            )
        if message["role"] == "tool" and not answers_a_call:
            place.refuse(
                f"message {number} is a tool's result that follows no call",
                "Put the assistant's message with tool_calls before it.",
            )
        answers_a_call = "tool_calls" in message or message["role"] == "tool"


def _check_alternation(conversation: Conversation, place: Place) -> None:
    """User and assistant take turns; calls and their results are inside the assistant's."""
    expected = "user"
    for number, message in enumerate(conversation, 1):
        role = message["role"]
        if role == "system":
            continue
        if expected == "assistant" and (role == "tool" or "tool_calls" in message):
            continue
        if role != expected:
            place.refuse(
                f"message {number} has the role {role!r} where {expected!r} is due",
                "The base's chat template renders only turns that alternate, the user first; join "
                "consecutive messages of one role.",
            )
        expected = "assistant" if expected == "user" else "user"


def parsed(text: str) -> Any:
    """The value of a JSON text; None if it is not one."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _members(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()]
    return value if isinstance(value, list) else []


def _is_plain(value: Any) -> bool:
    """Of JSON's types, as a table's need not be, and rendered within Python's recursion limit."""
    level = [value]
    for _ in range(_MAX_DEPTH + 1):
        if not all(one is None or isinstance(one, _JSON_TYPES) for one in level):
            return False
        level = [member for one in level for member in _members(one)]
    return not level


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and bool(value)
