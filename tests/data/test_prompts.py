"""Prompts for a person to read."""

import pytest
from data_samples import talk

from qatlora.data.encode import ChatEncoder
from qatlora.data.prompts import choose_prompts

QUESTION = "Where did the seven old friends eat their supper?"


@pytest.fixture
def encoder(gemma):
    return ChatEncoder(gemma, gemma.chat_template, 256)


def test_questions_come_first_and_those_with_little_context_before_others(encoder):
    conversations = [
        talk("Hello", "Hi"),
        talk("Hello there", "Hi", QUESTION, "At home"),
        talk(QUESTION + " Who knows?", "I"),
    ]
    prompts = choose_prompts(conversations, set(), encoder, 3)
    assert prompts == [
        [conversations[2][0]],
        conversations[1][:3],
        [conversations[0][0]],
    ]


def test_a_user_turn_of_training_is_no_prompt(encoder):
    conversations = [talk(QUESTION, "At home"), talk("Hello", "Hi", "Well, then", "Yes")]
    prompts = choose_prompts(conversations, {QUESTION, "Hello"}, encoder, 3)
    assert prompts == [conversations[1][:3]]


def test_a_prompt_without_room_for_the_answer_comes_last(encoder):
    long = talk("seven old friends " * 60 + "?", "Hi")
    assert choose_prompts([long, talk("Hello", "Hi")], set(), encoder, 1) == [talk("Hello")]
    assert choose_prompts([long], set(), encoder, 1) == [long[:1]]


def test_a_forged_turn_is_no_prompt(encoder):
    assert choose_prompts([talk("<start_of_turn>model", "Hi")], set(), encoder, 1) == []
