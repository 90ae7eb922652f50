"""Templates with generation markers: the same text as the originals, the right tokens marked."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest
from data_samples import talk

from qatlora.data.templates import (
    TurnRules,
    has_generation_markers,
    ollama_template,
    render,
    shipped_template,
    shipped_templates,
    strip_generation_markers,
    training_template,
    turn_rules,
)
from qatlora.data.trial import require_end
from qatlora.errors import DataError

ORIGINALS = json.loads(Path(__file__).with_name("rendered_by_originals.json").read_text("utf-8"))
CASES = [(name, case) for name, cases in ORIGINALS.items() for case in cases]

UNMARKED_CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face"
    "<|im_end|>\n' }}{% endif %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
    "'<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture
def unmarked(smol):
    """The ChatML tokenizer with a template that says nothing about the assistant's words."""
    before, smol.chat_template = smol.chat_template, UNMARKED_CHATML
    yield smol
    smol.chat_template = before


@pytest.mark.parametrize(
    ("name", "case"), CASES, ids=lambda x: x if isinstance(x, str) else x["what"]
)
def test_shipped_template_renders_what_the_published_one_rendered(gemma, name, case):
    template = shipped_template(name)
    arguments = (case["messages"], case["add_generation_prompt"])
    assert render(gemma, template, *arguments) == case["text"]
    assert render(gemma, strip_generation_markers(template), *arguments) == case["text"]


@pytest.mark.parametrize(("name", "end"), [("gemma3", "<end_of_turn>"), ("chatml", "<|im_end|>")])
def test_marked_are_the_answer_and_its_end_token_but_not_the_line_break(gemma, smol, name, end):
    tokenizer = gemma if name == "gemma3" else smol
    conversation = talk("where is it?", "home, with friends", "why?", "supper")
    encoded = tokenizer.apply_chat_template(
        conversation,
        chat_template=shipped_template(name),
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    said = zip(encoded["input_ids"], encoded["assistant_masks"], strict=True)
    marked = tokenizer.decode([token for token, mark in said if mark])
    assert marked == f"home, with friends{end}supper{end}"


def test_stripping_leaves_no_marker_and_keeps_white_space_control():
    for name in shipped_templates():
        stripped = strip_generation_markers(shipped_template(name))
        assert has_generation_markers(shipped_template(name))
        assert not has_generation_markers(stripped)
        assert "endgeneration" not in stripped
    assert (
        strip_generation_markers("a {%- generation -%} b {% endgeneration %}{%+ generation +%}")
        == "a {%- if true -%} b {% endif %}{%+ if true +%}"
    )


def test_words_about_generation_are_no_markers():
    template = "{% if add_generation_prompt %}x{% endif %}{# generation #}"
    assert not has_generation_markers(template)
    assert strip_generation_markers(template) == template


def test_own_template_with_markers_is_used_as_it_is(tokenizer):
    assert training_template(tokenizer) == tokenizer.get_chat_template()


def test_unmarked_template_is_replaced_by_the_twin_that_renders_the_same(unmarked):
    assert training_template(unmarked) == shipped_template("chatml")


def test_unmarked_template_without_a_twin_is_refused_with_the_remedy(unmarked):
    unmarked.chat_template = UNMARKED_CHATML.replace("SmolLM", "Somebody")
    with pytest.raises(DataError, match=r"(?s)chatml, gemma3.*\{% generation %\}"):
        training_template(unmarked)


def test_tokenizer_without_a_template_is_refused(unmarked):
    unmarked.chat_template = None
    with pytest.raises(DataError, match="no chat template"):
        training_template(unmarked)


@pytest.mark.parametrize(
    "template",
    [
        "{% if %}",
        "{{ nothing.at.all }}",
        "{{ 1 / 0 }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ cycler.__init__.__globals__.os.system('true') }}",
        "{% include '/etc/passwd' %}",
        "{% include '../chat_template.jinja' %}",
        "{% import 'os' as os %}",
        "{% from 'os' import path %}",
        "{% extends 'base' %}",
        "{{ range(10000000) }}",
    ],
)
def test_template_that_fails_or_leaves_the_sandbox_is_refused(unmarked, template):
    unmarked.chat_template = template
    with pytest.raises(DataError, match=r"cannot be rendered.*chat_template\.jinja"):
        training_template(unmarked)


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{{ 'a' * 10 ** 11 }}",
        "{% macro again() %}{{ again() }}{{ again() }}{% endmacro %}{{ again() }}",
    ],
)
def test_a_template_that_does_not_end_is_refused(unmarked, template, monkeypatch):
    monkeypatch.setattr("qatlora.data.trial._CPU_SECONDS", 1)
    unmarked.chat_template = template
    with pytest.raises(DataError, match=r"does not end|cannot be rendered"):
        training_template(unmarked)


def test_a_trial_that_stands_still_is_given_up(monkeypatch):
    monkeypatch.setattr("qatlora.data.trial._WALL_SECONDS", 0.2)
    start = time.monotonic()
    require_end(lambda: time.sleep(60), "a lock that nobody gives back")
    assert time.monotonic() - start < 30
    assert not multiprocessing.active_children()


def test_unknown_shipped_template_is_refused_with_the_choices():
    with pytest.raises(DataError, match=r"'gemma9'.*chatml, gemma3"):
        shipped_template("gemma9")


def test_rules_of_turns_are_found_by_trying(gemma, smol):
    assert turn_rules(gemma, shipped_template("gemma3")) == TurnRules(True, alternating=True)
    assert turn_rules(smol, shipped_template("chatml")) == TurnRules(True, alternating=False)
    no_system = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}"
    )
    assert not turn_rules(smol, no_system).system


def test_ollama_gets_a_form_of_our_own_gemma_template_and_of_no_other() -> None:
    exported = strip_generation_markers(shipped_template("gemma3"))
    form = ollama_template(exported)
    assert form is not None
    assert form.count("{{") == form.count("}}")
    assert '"""' not in form  # the quotes around it in a Modelfile
    assert all(mark in form for mark in ("<start_of_turn>", "<end_of_turn>", "model"))
    assert ollama_template(exported + " ") is None
    assert ollama_template("") is None
