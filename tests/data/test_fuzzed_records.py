"""Hostile files of conversations: what was said comes out, or an error names file and record."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import talk
from fuzzing import examples
from hypothesis import given
from hypothesis import strategies as st

from qatlora.config import DataKind
from qatlora.data.chats import OwnChats, open_chats
from qatlora.data.encode import ChatEncoder
from qatlora.data.messages import ROLES, Conversation
from qatlora.data.records import open_records
from qatlora.data.templates import shipped_template, turn_rules
from qatlora.errors import DataError

MANY, FEW = examples(150), examples(25)  # a table is opened by the library datasets

WORDS = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=30).filter(str.strip)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)
KEYS = ["messages", "role", "content", "tool_calls", "tools", "conversations", "from", "value",
        "instruction", "input", "output", "system", "prompt", "completion", "history"]  # fmt: skip


def as_messages(said: list[dict[str, str]]) -> dict[str, Any]:
    return {"messages": said}


def as_sharegpt(said: list[dict[str, str]]) -> dict[str, Any]:
    speakers = {"user": "human", "assistant": "gpt"}
    return {
        "conversations": [{"from": speakers[m["role"]], "value": m["content"]} for m in said],
        "id": 7,
    }


def as_alpaca(said: list[dict[str, str]]) -> dict[str, Any]:
    return {"instruction": said[0]["content"], "input": "", "output": said[1]["content"]}


def as_prompt(said: list[dict[str, str]]) -> dict[str, Any]:
    return {"prompt": said[:-1], "completion": said[-1:]}


LAYOUTS = [as_messages, as_sharegpt, as_alpaca, as_prompt]
LAYOUT = st.sampled_from(LAYOUTS)
BYTES = [[{"name": b"\xff", "type": None}]]
GOOD = json.dumps(as_messages(talk("Ask", "Answer")))


@st.composite
def conversations(draw: st.DrawFn, max_exchanges: int = 2) -> list[dict[str, str]]:
    texts = draw(st.lists(WORDS, min_size=2, max_size=2 * max_exchanges))
    roles = ("user", "assistant")
    return [
        {"role": roles[number % 2], "content": text}
        for number, text in enumerate(texts[: len(texts) // 2 * 2])
    ]


def nodes(value: Any) -> list[tuple[Any, Any]]:
    """(container, key) of everything inside a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value))
    inside = [value[key] for key in keys]
    return [(value, key) for key in keys] + [
        pair for one in inside if isinstance(one, dict | list) for pair in nodes(one)
    ]


@st.composite
def broken_records(draw: st.DrawFn) -> Any:
    """A record with one or two things replaced, removed or added; or any JSON value at all."""
    if draw(st.integers(0, 9)) == 0:
        return draw(VALUES)
    record = copy.deepcopy(draw(LAYOUT)(draw(conversations())))
    for _ in range(draw(st.integers(1, 2))):
        places = nodes(record)
        if not places:
            break
        container, key = draw(st.sampled_from(places))
        change = draw(st.sampled_from(["replace", "remove", "add"]))
        if change == "remove":
            del container[key]
        elif change == "add" and isinstance(container, dict):
            container[draw(st.sampled_from(KEYS))] = draw(VALUES)
        else:
            container[key] = draw(VALUES)
    return record


@pytest.fixture(scope="session")
def encoder(smol: Any) -> ChatEncoder:
    return ChatEncoder(smol, shipped_template("chatml"), max_length=64)


@pytest.fixture
def opened(encoder: ChatEncoder) -> Callable[[Path], OwnChats]:
    rules = turn_rules(encoder.tokenizer, encoder.template)

    def open_file(path: Path) -> OwnChats:
        kind = DataKind.jsonl if path.suffix == ".jsonl" else DataKind.files
        return open_chats(open_records(path, kind), rules)

    return open_file


def outcome(path: Path, opened: Callable[[Path], OwnChats]) -> list[Conversation] | DataError:
    try:
        chats = opened(path)
        return [chats[index] for index in range(len(chats))]
    except DataError as error:
        return error


def check(path: Path, read: list[Conversation] | DataError, encoder: ChatEncoder) -> None:
    """The file is named, or training can use the conversations."""
    if isinstance(read, DataError):
        assert str(path) in str(read), read
        return
    for conversation, row in zip(read, encoder.encode(read), strict=True):
        assert conversation[-1]["role"] == "assistant"
        assert all(message["role"] in ROLES for message in conversation)
        assert all(isinstance(message["content"], str) for message in conversation)
        assert (row.row is None) == (row.dropped is not None)


@MANY
@given(talks=st.lists(st.tuples(LAYOUT, conversations(1)), min_size=1, max_size=3), data=st.data())
def test_what_was_said_comes_out_of_every_layout(
    talks: list[Any], data: st.DataObject, opened: Any, tmp_path: Path
) -> None:
    layout = talks[0][0]
    path = tmp_path / data.draw(st.sampled_from(["chats.jsonl", "chats.json"]))
    records = [layout(said) for _, said in talks]
    whole = path.suffix == ".json"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text(json.dumps(records) if whole else "\n".join(lines), encoding="utf-8")
    chats = opened(path)
    assert [chats[index] for index in range(len(chats))] == [said for _, said in talks]


@MANY
@given(record=broken_records())
def test_a_broken_record_is_refused_with_its_line_or_read_as_a_conversation(
    record: Any, opened: Any, encoder: ChatEncoder, tmp_path: Path
) -> None:
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n{json.dumps(record)}\n", encoding="utf-8")
    read = outcome(path, opened)
    if isinstance(read, DataError):
        assert f"{path}, line 2: " in str(read)
    else:
        assert len(read) == 2
    check(path, read, encoder)


@MANY
@given(said=conversations(), data=st.data())
def test_a_damaged_file_of_lines_never_ends_in_a_traceback(
    said: list[dict[str, str]], data: st.DataObject, opened: Any, encoder: ChatEncoder,
    tmp_path: Path,
) -> None:  # fmt: skip
    suffix = data.draw(st.sampled_from([".jsonl", ".json"]))
    record = data.draw(LAYOUT)(said)
    content = bytearray(json.dumps([record, record] if suffix == ".json" else record).encode())
    for _ in range(data.draw(st.integers(0, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path = tmp_path / f"chats{suffix}"
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    check(path, outcome(path, opened), encoder)


@FEW
@given(said=conversations(), data=st.data())
def test_a_damaged_or_odd_table_never_ends_in_a_traceback(
    said: list[dict[str, str]], data: st.DataObject, opened: Any, encoder: ChatEncoder,
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path / "cache"))
    columns = {key: [value] for key, value in data.draw(LAYOUT)(said).items()}
    odd = st.sampled_from([[1], [None], [b"\xff"], [[[1]]], [{"a": None}], [1.5], [""], BYTES])
    for key in data.draw(st.lists(st.sampled_from(KEYS), max_size=1)):
        columns[key] = data.draw(odd)
    path = tmp_path / "chats.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(0, 2))):
        content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(content[: data.draw(st.sampled_from([len(content), len(content) // 2, 5]))])
    check(path, outcome(path, opened), encoder)
