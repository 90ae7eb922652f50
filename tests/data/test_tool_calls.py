"""Tool calls: where a template renders them they are trained, elsewhere they are refused."""

import json

import pytest
from data_samples import talk

from qatlora.data.chats import open_chats
from qatlora.data.encode import CONTROL_TOKEN, ChatEncoder
from qatlora.data.records import JsonLines
from qatlora.data.rows import IGNORED
from qatlora.data.templates import turn_rules
from qatlora.errors import DataError

TEMPLATE = (
    "{% for tool in tools or [] %}<|im_start|>tool {{ tool.function.name }}: "
    "{{ tool.function.description }}<|im_end|>{% endfor %}"
    "{% for turn in messages %}{{ '<|im_start|>' + turn.role + '\n' }}"
    "{% if turn.role == 'assistant' %}{% generation %}{{ turn.content }}"
    "{% for call in turn.tool_calls or [] %}{{ call.function.name }}"
    "({{ call.function.arguments | tojson }}){% endfor %}"
    "<|im_end|>{% endgeneration %}{% else %}{{ turn.content }}<|im_end|>{% endif %}\n{% endfor %}"
)
TOOLS = [{"function": {"name": "depth", "description": "how deep", "parameters": {}}}]
CALLING = [
    {"role": "user", "content": "how deep?"},
    {"role": "assistant", "tool_calls": [{"name": "depth", "arguments": {"lake": "old"}}]},
    {"role": "tool", "content": "seven"},
    {"role": "assistant", "content": "seven, friend"},
]


def write(tmp_path, messages=CALLING, tools=TOOLS):
    path = tmp_path / "calls.jsonl"
    path.write_text(json.dumps({"messages": messages, "tools": tools}))
    return JsonLines(path)


def test_calls_and_answers_are_trained_and_results_and_definitions_are_not(smol, tmp_path):
    chats = open_chats(write(tmp_path), turn_rules(smol, TEMPLATE))
    encoder = ChatEncoder(smol, TEMPLATE, 256, system_prompt="Be old.")
    plain, calling, again = encoder.encode([talk("Hi", "Hello"), chats[0], chats[0]])
    trained = smol.decode([label for label in calling.row.labels if label != IGNORED])
    assert trained == 'depth({"lake": "old"})<|im_end|>seven, friend<|im_end|>'
    text = smol.decode(calling.row.input_ids)
    assert "tool depth: how deep" in text
    assert "Be old." in text
    assert again == calling
    assert "depth" not in smol.decode(plain.row.input_ids)


@pytest.mark.parametrize(
    "change",
    [
        {"tools": [{"function": {"name": "depth", "description": "<|im_end|>"}}]},
        {"arguments": {"lake": 'a"<|im_end|>'}},
        {"arguments": {"<|im_start|>": 1}},
    ],
    ids=["definition", "argument", "name of an argument"],
)
def test_a_call_that_forges_a_turn_is_left_out(smol, tmp_path, change):
    messages = json.loads(json.dumps(CALLING))
    messages[1]["tool_calls"][0]["arguments"] = change.get("arguments", {})
    records = write(tmp_path, messages, change.get("tools", TOOLS))
    chats = open_chats(records, turn_rules(smol, TEMPLATE))
    [encoded] = ChatEncoder(smol, TEMPLATE, 256).encode([chats[0]])
    assert encoded.dropped == CONTROL_TOKEN


@pytest.mark.parametrize("messages", [CALLING, talk("a", "b")], ids=["calls", "definitions alone"])
def test_a_template_that_would_leave_them_out_silently_is_found_out(tokenizer, tmp_path, messages):
    rules = turn_rules(tokenizer, tokenizer.chat_template)
    assert not rules.tools
    with pytest.raises(DataError, match="line 1: message 1 has function definitions, which the"):
        open_chats(write(tmp_path, messages), rules)


def test_a_template_that_renders_all_but_the_definitions_is_not_enough(smol):
    without = TEMPLATE[TEMPLATE.index("{% for turn in") :]
    assert turn_rules(smol, TEMPLATE).tools
    assert not turn_rules(smol, without).tools
