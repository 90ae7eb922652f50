"""The shipped template of Gemma 4 against the published one, as llama.cpp's source has it."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
from data_samples import talk
from transformers import PreTrainedTokenizerBase

from qatlora.data.templates import (
    exported_template,
    render,
    shipped_template,
    strip_generation_markers,
    training_template,
)
from qatlora.llamacpp.source import llama_cpp_source

STRING, NUMBER = {"type": "string"}, {"type": "number"}
PLACE = {
    "type": "object",
    "properties": {"lat": NUMBER, "name": STRING | {"description": "its name", "nullable": True}},
    "required": ["lat"],
}
PARAMETERS = {
    "place": STRING | {"description": "a city"},
    "unit": STRING | {"enum": ["C", "F"]},
    "days": {"type": "array", "description": "dates", "items": STRING | {"description": "a date"}},
    "legs": {"type": "array", "items": PLACE},
    "names": {"type": "array", "items": {"type": ["string", "null"]}},
    "where": PLACE,
    "anything": {"type": "object"},
}
WEATHER = {
    "name": "weather",
    "description": "Weather of a place",
    "parameters": {"type": "object", "properties": PARAMETERS, "required": ["place", "unit"]},
}
CLOCK = {
    "name": "now",
    "description": "The time",
    "parameters": {"type": "object", "properties": {}},
    "response": {"description": "hours and minutes", "type": "object"},
}
TOOLS = [{"type": "function", "function": function} for function in (WEATHER, CLOCK)]
ARGUMENTS = {"place": "Oslo", "n": 3, "sure": True, "days": [1, "x"], "more": {"b": 1, "A": None}}
CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": ARGUMENTS}}
RAW_CALL = {"id": "2", "type": "function", "function": {"name": "now", "arguments": "as text"}}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def answer(content: Any, *calls: dict[str, Any], **more: Any) -> dict[str, Any]:
    return (
        {"role": "assistant", "content": content} | ({"tool_calls": calls} if calls else {}) | more
    )


def response(call: str, content: Any) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call, "content": content}


def text(words: str) -> dict[str, str]:
    return {"type": "text", "text": words}


QUESTION = user(" What is it?\n")
CONVERSATIONS = {
    "one question": [QUESTION],
    "white space": [QUESTION, answer("  b \n c ")],
    "system": [{"role": "system", "content": " s "}, QUESTION, answer("b"), QUESTION],
    "developer": [{"role": "developer", "content": "d"}, QUESTION],
    "old thoughts": [QUESTION, answer("<|channel>thought\nhm<channel|> b"), QUESTION, answer("d")],
    "a call": [QUESTION, answer("", CALL)],
    "a call after thoughts": [
        QUESTION, answer(None, CALL, reasoning="it rains"), response("1", "12 C"), answer("12."),
    ],
    "thoughts before the last question": [
        QUESTION, answer("", CALL, reasoning="it rains"), response("1", "12 C"), QUESTION,
    ],
    "two calls and words": [
        QUESTION, answer("Look:", CALL, RAW_CALL, reasoning_content="both"),
        response("1", [text("x"), text("y")]), response("2", None), answer("Done"), QUESTION,
    ],
    "a response at the end": [QUESTION, answer("", CALL), response("1", "12 C")],
    "responses inside the message": [
        QUESTION, answer("z", CALL, tool_responses=[
            {"name": "weather", "response": {"t": 12, "s": "x"}}, {"response": "q"},
        ]), answer("ok"),
    ],
    "parts": [user([{"type": "image"}, text(" look ")]), answer([text(" ok ")])],
    "turns of one role": [QUESTION, user("b"), answer("c"), answer("d"), user("e")],
    "the assistant first": [answer("x"), QUESTION, answer("c")],
}  # fmt: skip


@pytest.fixture(scope="session")
def original() -> str:
    path = llama_cpp_source() / "models" / "templates" / "google-gemma-4-31B-it.jinja"
    return path.read_text(encoding="utf-8")


def option_sets() -> Iterator[dict[str, Any]]:
    for tools, prompt in itertools.product((None, TOOLS[:1], TOOLS), (False, True)):
        for thinking in ({}, {"enable_thinking": False}, {"enable_thinking": True}):
            yield {"tools": tools, "add_generation_prompt": prompt} | thinking


@pytest.mark.llama_cpp
@pytest.mark.parametrize("name", CONVERSATIONS)
def test_the_shipped_template_renders_what_the_published_one_renders(
    name: str, gemma: PreTrainedTokenizerBase, original: str
):
    twin = shipped_template("gemma4")
    for options in option_sets():
        expected = render(gemma, original, CONVERSATIONS[name], **options)
        assert render(gemma, twin, CONVERSATIONS[name], **options) == expected
        stripped = strip_generation_markers(twin)
        assert render(gemma, stripped, CONVERSATIONS[name], **options) == expected


def marked(tokenizer: PreTrainedTokenizerBase, conversation: list[dict[str, Any]]) -> str:
    encoded = tokenizer.apply_chat_template(
        conversation,
        chat_template=shipped_template("gemma4"),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    return tokenizer.decode([token for token, mark in said if mark])


def test_marked_is_what_the_model_says_and_what_ends_it(gemma: PreTrainedTokenizerBase):
    assert marked(gemma, talk("a b", "home, with friends", "c", "supper")) == (
        "home, with friends<turn|>supper<turn|>"
    )
    call = {"function": {"name": "now", "arguments": {"place": "here"}}}
    conversation = [
        QUESTION,
        answer("", call, reasoning="hm"),
        response("1", "noon"),
        answer("Noon."),
    ]
    assert marked(gemma, conversation) == (
        "<|channel>thought\nhm\n<channel|>"
        '<|tool_call>call:now{place:<|"|>here<|"|>}<tool_call|><|tool_response>'
        "Noon.<turn|>"
    )


@pytest.mark.llama_cpp
def test_the_exported_file_keeps_the_published_text(gemma: PreTrainedTokenizerBase, original: str):
    """llama.cpp looks for phrases of it to know how to parse tool calls."""
    before, gemma.chat_template = gemma.chat_template, original
    try:
        twin = training_template(gemma)
    finally:
        gemma.chat_template = before
    assert twin == shipped_template("gemma4")
    assert exported_template(gemma, twin, original) == original
    changed = original.replace("<|turn>", "<|TURN>")
    for other in (None, changed, twin):
        assert exported_template(gemma, twin, other) == strip_generation_markers(twin)
