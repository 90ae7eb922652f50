"""Layouts of records: each gives the same messages, and the first record says which one it is."""

import json

import pytest
from data_samples import talk

from qatlora.config import ChatFormat
from qatlora.data.chats import open_chats
from qatlora.data.messages import ROLES
from qatlora.data.records import JsonLines
from qatlora.data.templates import TurnRules
from qatlora.errors import DataError

ANY_ORDER = TurnRules(system=True, alternating=False, tools=True)


def opened(tmp_path, *records, chat_format=ChatFormat.auto):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return open_chats(JsonLines(path), ANY_ORDER, chat_format)


def turns(*pairs):
    return {"conversations": [{"from": speaker, "value": value} for speaker, value in pairs]}


SAME = {
    "messages": {"messages": talk("Who?", "Me.", system="Be old."), "prompt": "unread"},
    "sharegpt": turns(("system", "Be old."), ("human", "Who?"), ("gpt", "Me.")),
    "sharegpt with a system column": turns(("user", "Who?"), ("assistant", "Me."))
    | {"system": "Be old."},
    "alpaca": {"instruction": "Who?", "input": "", "output": "Me.", "system": "Be old."},
    "prompt_completion": {
        "prompt": talk("Who?", system="Be old."),
        "completion": [{"role": "assistant", "content": "Me."}],
    },
}


@pytest.mark.parametrize("name", SAME)
def test_every_layout_gives_the_same_conversation_and_is_named(tmp_path, name):
    chats = opened(tmp_path, SAME[name])
    assert chats[0] == talk("Who?", "Me.", system="Be old.")
    assert chats.format == name.split()[0]


def test_texts_are_one_question_and_one_answer(tmp_path):
    alpaca = {"instruction": "Translate.", "input": "Hallo", "output": "Hello"}
    assert opened(tmp_path, alpaca)[0] == talk("Translate.\n\nHallo", "Hello")
    assert opened(tmp_path, {"prompt": "a", "completion": "b"})[0] == talk("a", "b")


def test_several_turns_are_kept_and_an_unanswered_one_is_left_off(tmp_path):
    record = turns(("human", "a"), ("gpt", "b"), ("human", "c"), ("gpt", "d"), ("human", "e"))
    assert opened(tmp_path, record)[0] == talk("a", "b", "c", "d")


def test_columns_of_several_formats_are_refused_with_the_choices_and_read_as_told(tmp_path):
    both = SAME["messages"] | SAME["alpaca"]
    with pytest.raises(DataError, match=r"line 1: .*data\.format=messages\|alpaca"):
        opened(tmp_path, both)
    chats = opened(tmp_path, both | {"output": "You."}, chat_format=ChatFormat.alpaca)
    assert chats[0][-1]["content"] == "You."


def test_columns_of_no_format_are_refused_with_the_formats(tmp_path):
    with pytest.raises(DataError, match="line 1: columns of no known format.*'text'") as refused:
        opened(tmp_path, {"text": "Hello"})
    assert all(
        name.name in str(refused.value) for name in ChatFormat if name is not ChatFormat.auto
    )


BAD_SECOND = {
    "another format": (SAME["messages"], SAME["alpaca"], "no list 'messages'.*'instruction'"),
    "unknown speaker": (SAME["sharegpt"], turns(("bot", "x")), "turn 1 has the unknown speaker"),
    "no speaker": (SAME["sharegpt"], {"conversations": [{"value": "x"}]}, "turn 1 has no 'from'"),
    "roles as speakers": (SAME["sharegpt"], {"conversations": talk("a", "b")}, "'messages'"),
    "turn no object": (SAME["sharegpt"], {"conversations": ["x"]}, "message 1 is a JSON string"),
    "no value": (SAME["sharegpt"], {"conversations": [{"from": "gpt"}]}, "has no 'content'"),
    "no turns": (SAME["sharegpt"], {"conversations": []}, "no list 'conversations'"),
    "no output": (SAME["alpaca"], {"instruction": "a"}, "no 'output'"),
    "number": (SAME["alpaca"], {"instruction": "a", "output": 3}, "a JSON number as 'output'"),
    "empty": (SAME["alpaca"], {"instruction": "a", "output": " "}, r"\(assistant\) is empty"),
    "history": (SAME["alpaca"], SAME["alpaca"] | {"history": [["a", "b"]]}, "would be lost"),
    "system": (SAME["alpaca"], SAME["alpaca"] | {"system": 3}, "a JSON number as 'system'"),
    "no completion": (SAME["prompt_completion"], {"prompt": "a"}, "no 'completion'"),
    "tools": (SAME["messages"], SAME["messages"] | {"tools": "{"}, "'tools' is neither"),
}


@pytest.mark.parametrize(("good", "bad", "finding"), BAD_SECOND.values(), ids=BAD_SECOND.keys())
def test_a_record_that_will_not_do_is_named_in_one_paragraph(tmp_path, good, bad, finding):
    with pytest.raises(DataError, match=finding) as error:
        opened(tmp_path, good, bad)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'chats.jsonl'}, line 2: ")
    assert "\n" not in message


CALL = {"name": "find_depth", "arguments": {"lake": "Baikal"}}
TALK_WITH_CALL = [
    {"role": "user", "content": "How deep is Baikal?"},
    {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": CALL}]},
    {"role": "tool", "content": "1642"},
    {"role": "assistant", "content": "1642 metres."},
]
TOOLS = [{"type": "function", "function": {"name": "find_depth", "parameters": {}}}]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": TALK_WITH_CALL, "tools": TOOLS},
        {
            "messages": [
                TALK_WITH_CALL[0],
                {
                    "role": "assistant",
                    "tool_calls": [{"function": CALL | {"arguments": '{"lake": "Baikal"}'}}],
                },
                *TALK_WITH_CALL[2:],
            ],
            "tools": json.dumps(TOOLS),
        },
        turns(
            ("human", "How deep is Baikal?"),
            ("function_call", json.dumps(CALL)),
            ("observation", "1642"),
            ("gpt", "1642 metres."),
        )
        | {"tools": json.dumps(TOOLS)},
    ],
    ids=["objects", "texts", "sharegpt"],
)
def test_calls_come_in_one_shape_and_the_first_message_carries_the_definitions(tmp_path, record):
    first, *others = TALK_WITH_CALL
    assert opened(tmp_path, record)[0] == [first | {"tools": TOOLS}, *others]


BAD_CALLS = {
    "no list": ({"tool_calls": {"name": "f"}}, "a JSON object as tool_calls"),
    "no name": ({"tool_calls": [{"function": {}}]}, "without a function's name"),
    "no object": ({"tool_calls": [{"name": "f", "arguments": "[1]"}]}, "'f' with arguments"),
    "too deep": (
        {"tool_calls": [{"name": "f", "arguments": '{"a":' + "[" * 99 + "]" * 99 + "}"}]},
        "32 levels",
    ),
    "half a pair": ({"tool_calls": [{"name": "f", "arguments": {"x": "\ud83e"}}]}, "surrogate"),
}


@pytest.mark.parametrize(("message", "finding"), BAD_CALLS.values(), ids=BAD_CALLS.keys())
def test_a_call_that_no_template_could_render_is_refused(tmp_path, message, finding):
    with pytest.raises(DataError, match=f"line 1: .*{finding}"):
        opened(tmp_path, {"messages": [*talk("a"), {"role": "assistant"} | message]})


def test_results_follow_calls_and_only_the_assistant_calls(tmp_path):
    result = {"role": "tool", "content": "x"}
    with pytest.raises(DataError, match="message 2 is a tool's result that follows no call"):
        opened(tmp_path, {"messages": [*talk("a"), result, *TALK_WITH_CALL[3:]]})
    calling = talk("a")[0] | {"tool_calls": [CALL]}
    with pytest.raises(DataError, match=r"message 1 \(user\) has tool_calls"):
        opened(tmp_path, {"messages": [calling, *TALK_WITH_CALL[3:]]})


def test_calls_do_not_count_as_turns_where_turns_must_alternate(tmp_path):
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": TALK_WITH_CALL}))
    rules = TurnRules(system=True, alternating=True, tools=True)
    assert open_chats(JsonLines(path), rules)[0] == TALK_WITH_CALL
    path.write_text(json.dumps({"messages": [*TALK_WITH_CALL, TALK_WITH_CALL[3]]}))
    with pytest.raises(DataError, match="message 5.*'user' is due"):
        open_chats(JsonLines(path), rules)


def test_the_roles_are_those_of_chat_templates():
    assert ROLES == ("system", "user", "assistant", "tool")
