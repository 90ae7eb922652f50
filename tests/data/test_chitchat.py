"""The default conversations and their filters."""

import json

import pytest
from data_samples import chitchat_record

from qatlora.data.chitchat import MIN_TURNS, open_chitchat
from qatlora.errors import DataError


def opened(tmp_path, **records):
    (tmp_path / "chitchat_dataset").mkdir(exist_ok=True)
    (tmp_path / "chitchat_dataset" / "dataset.json").write_text(json.dumps(records))
    return open_chitchat(tmp_path)


def with_text(text):
    record = chitchat_record(1)
    record["messages"][3][0]["text"] = text
    return record


def test_who_speaks_first_is_the_user_and_messages_in_a_row_are_one_turn(tmp_path):
    chats = opened(tmp_path, a=chitchat_record(7, num_turns=9))
    assert [message["role"] for message in chats[0]] == ["user", "assistant"] * 4
    assert chats[0][1]["content"] == (
        "line 0 of turn 1 in talk 7, all right?\nline 1 of turn 1 in talk 7, all right?"
    )


def test_the_order_depends_on_the_ids_alone(tmp_path):
    first = opened(tmp_path, b=chitchat_record(1), a=chitchat_record(2))
    second = opened(tmp_path, a=chitchat_record(2), b=chitchat_record(1))
    assert first == second
    assert len(set(first.digests)) == 2


def test_every_reason_to_drop_is_counted(tmp_path):
    alone = chitchat_record(1)
    for turn in alone["messages"]:
        for message in turn:
            message["sender"] = "first"
    unordered = chitchat_record(1)
    unordered["messages"][4:6] = unordered["messages"][5:3:-1]
    chats = opened(
        tmp_path,
        good=chitchat_record(0),
        unrated=chitchat_record(2) | {"ratings": None},
        alone=alone,
        unordered=unordered,
        short=chitchat_record(1, num_turns=MIN_TURNS - 1),
        rated_low=chitchat_record(1) | {"ratings": {"witty": "1", "upbeat": 2}},
        pasted=with_text("a " * 800),
        silent=chitchat_record(1) | {"messages": [*chitchat_record(1)["messages"], []]},
        link=with_text("see www.example.org now"),
        address=with_text("write to Ann@Example.org"),
        telephone=with_text("call 801-555 0123"),
    )
    assert len(chats) == 2
    assert chats.dropped == {
        "not two speakers": 1,
        "speakers do not alternate": 2,
        "fewer than 8 turns": 1,
        "rated below 4 of 10": 1,
        "a turn of more than 1000 characters (pasted text)": 1,
        "a link, an e-mail address or a telephone number": 3,
    }


def test_a_turn_of_blanks_drops_the_conversation(tmp_path):
    chats = opened(tmp_path, good=chitchat_record(0), blank=with_text("  "))
    assert len(chats) == 2  # its second message still says something
    record = chitchat_record(1)
    record["messages"][2] = [{"text": " ", "sender": "first"}]
    assert opened(tmp_path, blank=record).dropped == {"an empty turn": 1}


@pytest.mark.parametrize("content", ["", "[1]", '{"a": {}}', '{"a": {"messages": [3]}}'])
def test_a_file_that_is_not_the_packages_is_refused_by_name(tmp_path, content):
    (tmp_path / "chitchat_dataset").mkdir()
    (tmp_path / "chitchat_dataset" / "dataset.json").write_text(content)
    with pytest.raises(DataError, match=r"dataset\.json is not the file"):
        open_chitchat(tmp_path)


def test_a_folder_without_the_file_is_refused_by_name(tmp_path):
    with pytest.raises(DataError, match=r"dataset\.json is not the file.*No such file"):
        open_chitchat(tmp_path)
