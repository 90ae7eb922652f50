"""The JSONL reader: conversations, or one paragraph with file and line number."""

import json

import pytest
from data_samples import talk, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from qatlora.data import messages, records
from qatlora.data.chats import OwnChats
from qatlora.data.chats import open_chats as open_records
from qatlora.data.templates import TurnRules
from qatlora.errors import DataError

ANY_ORDER = TurnRules(system=True, alternating=False)
ALTERNATING = TurnRules(system=True, alternating=True)
GOOD = json.dumps({"messages": talk("Hi", "Hello")})


def open_chats(path, rules) -> OwnChats:
    return open_records(records.JsonLines(path), rules)


def message(role, content):
    return {"role": role, "content": content}


def line(*messages):
    return json.dumps({"messages": messages})


def test_conversations_are_read_back_in_any_order(tmp_path):
    conversations = [talk(f"Frage {n} ü 🦊?", "你好\n\nx", system="s") for n in range(5)]
    file = open_chats(write_jsonl(tmp_path / "chats.jsonl", conversations), ALTERNATING)
    assert [file[i] for i in (4, 0, 2)] == [conversations[i] for i in (4, 0, 2)]
    assert len(file) == 5


def test_empty_lines_a_byte_order_mark_crlf_and_unknown_keys_do_no_harm(tmp_path):
    path = tmp_path / "chats.jsonl"
    record = {
        "id": 7,
        "messages": [message("user", "Hi") | {"name": "Ann"}, *talk("x", "Hello")[1:]],
    }
    text = "\ufeff" + json.dumps(record) + "\r\n\r\n  \n" + GOOD
    path.write_bytes(text.encode())
    file = open_chats(path, ALTERNATING)
    assert [file[0], file[1]] == [talk("Hi", "Hello")] * 2
    assert file.digests[0] == file.digests[1]


def test_turns_after_the_last_answer_are_left_off(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [talk("Hi", "Hello", "Still there?")])
    assert open_chats(path, ALTERNATING)[0] == talk("Hi", "Hello")


BAD_LINES = {
    "no JSON": ("Hello there", "not JSON.*Hello there"),
    "cut-off JSON": (GOOD[:-5], "not JSON"),
    "list": ("[1]", "a JSON list where an object is needed"),
    "number": ("12", "a JSON number"),
    "other columns": ('{"instruction": "a", "output": "b"}', "no list 'messages'.*'instruction'"),
    "messages no list": ('{"messages": "Hi"}', "no list 'messages'"),
    "no messages": ('{"messages": []}', "no list 'messages'"),
    "message no object": ('{"messages": ["Hi"]}', "message 1 is a JSON string"),
    "no answer": (line(message("user", "Hi")), "no message with the role 'assistant'"),
    "unknown role": (line(message("human", "Hi")), "unknown role 'human'.*system, user, assistant"),
    "list as role": (line(message(["user"], "Hi")), "unknown role"),
    "tool": (
        line(message("user", "a"), message("tool", "b"), message("assistant", "c")),
        "message 2 has tool calls, which the base's chat template cannot render",
    ),
    "no role": (line({"content": "Hi"}), "message 1 has no 'role'"),
    "no content": (line({"role": "user"}), "message 1 has no 'content'"),
    "null": (line(message("user", None)), "a JSON null as content"),
    "content number": (line(message("user", 3)), "a JSON number as content"),
    "image": (line(message("user", [{"type": "image"}])), "kind image.*Only text"),
    "empty": (line(*talk("Hi", " \n")), r"message 2 \(assistant\) is empty"),
    "half a pair": ('{"messages": [{"role": "user", "content": "\\ud83e"}]}', "surrogate"),
    "late system": (
        line(*talk("Hi", "Hello"), *talk("x", "y", system="s")),
        "message 3 is a system",
    ),
    "two users": (
        line(message("user", "a"), *talk("Hi", "Hello")),
        "message 2.*'assistant' is due",
    ),
    "begins with answer": (line(message("assistant", "a")), "message 1.*'user' is due"),
    "deep brackets": ("[" * 100_000, "cannot be read"),
    "endless number": ("1" * 10_000, "cannot be read"),
}


@pytest.mark.parametrize(("bad", "finding"), BAD_LINES.values(), ids=BAD_LINES.keys())
def test_bad_line_is_named_with_file_line_and_remedy_in_one_paragraph(tmp_path, bad, finding):
    path = tmp_path / "chats.jsonl"
    path.write_text(f"{GOOD}\n\n{bad}\n{GOOD}\n")
    with pytest.raises(DataError, match=finding) as error:
        open_chats(path, ALTERNATING)
    message = str(error.value)
    assert message.startswith(f"{path}, line 3: ")
    assert "\n" not in message
    assert len(message) < 600


def test_bytes_that_are_not_utf8_are_named_with_file_and_line(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(GOOD.encode() + b"\n\x1f\x8b\x08\xff\n")
    with pytest.raises(DataError, match=r"chats\.jsonl, line 2: byte 1 is not UTF-8"):
        open_chats(path, ALTERNATING)


def test_a_line_without_end_is_refused_without_reading_all_of_it(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_LINE_BYTES", 1 << 20)
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"0" * (3 << 20))
    with pytest.raises(DataError, match="line 1: the line is longer than 1 MiB"):
        open_chats(path, ALTERNATING)


@pytest.mark.parametrize("content", [b"", b"\n \n\r\n"])
def test_empty_file_is_refused(tmp_path, content):
    path = tmp_path / "chats.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"chats\.jsonl holds no conversation"):
        open_chats(path, ALTERNATING)


def test_missing_file_and_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match=r"absent\.jsonl cannot be read: No such file"):
        open_chats(tmp_path / "absent.jsonl", ALTERNATING)
    with pytest.raises(DataError, match="cannot be read: Is a directory"):
        open_chats(tmp_path, ALTERNATING)


def test_system_message_is_refused_where_the_template_has_no_place_for_it(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [talk("Hi", "Hello", system="s")])
    with pytest.raises(DataError, match="line 1: a system message, which"):
        open_chats(path, TurnRules(system=False, alternating=True))


def test_consecutive_roles_are_allowed_where_the_template_renders_them(tmp_path):
    conversation = [message("user", "a"), *talk("Hi", "Hello")]
    path = write_jsonl(tmp_path / "chats.jsonl", [conversation])
    assert open_chats(path, ANY_ORDER)[0] == conversation


def test_file_that_changes_between_check_and_use_is_noticed(tmp_path):
    path = write_jsonl(tmp_path / "chats.jsonl", [talk("Hi", "Hello"), talk("Who?", "Me")])
    file = open_chats(path, ALTERNATING)
    path.write_text(path.read_text().replace("Me", "Us"))
    assert file[0] == talk("Hi", "Hello")
    with pytest.raises(DataError, match=r"line 2.*not what it was"):
        file[1]


JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text(max_size=8) | st.sampled_from(messages.ROLES),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["messages", "role", "content", "x"]), inner, max_size=3)
    ),
)


@given(st.lists(st.binary(max_size=40) | JSON.map(lambda x: json.dumps(x).encode()), max_size=4))
def test_any_bytes_give_conversations_or_a_data_error(tmp_path_factory, lines):
    path = tmp_path_factory.getbasetemp() / "any.jsonl"
    path.write_bytes(b"\n".join(lines))
    found = ""
    try:
        file = open_chats(path, ANY_ORDER)
        assert all(file[i][-1]["role"] == "assistant" for i in range(len(file)))
    except DataError as error:
        found = str(error)
    assert not found or (str(path) in found and "\n" not in found)
