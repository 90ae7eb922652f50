"""Records in JSON lists, parquet and hub data sets: the same conversations as from JSONL."""

import json
import pickle

import pyarrow
import pyarrow.parquet
import pytest
from data_samples import talk, write_jsonl

from qatlora.config import DataKind
from qatlora.data import records
from qatlora.data.chats import open_chats
from qatlora.data.records import open_hub, open_records
from qatlora.data.templates import TurnRules
from qatlora.errors import DataError

RULES = TurnRules(system=True, alternating=True, tools=True)
CONVERSATIONS = [talk(f"Wer {n}?", "ich 🦊", "und?", "du") for n in range(300)]
ROWS = [{"messages": each, "unread": b"\xff" * 9} for each in CONVERSATIONS]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Tables are mapped from files below the cache folder."""
    monkeypatch.setenv("QATLORA_CACHE", str(tmp_path / "cache"))


def write_parquet(path, rows):
    path.parent.mkdir(exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=100)
    return path


def chats_of(path, kind=DataKind.files):
    return open_chats(open_records(path, kind), RULES)


def test_a_json_list_jsonl_and_parquet_hold_the_same_conversations(tmp_path):
    (tmp_path / "list.json").write_text(
        "\ufeff \n" + json.dumps([{"messages": each} for each in CONVERSATIONS])
    )
    lines = write_jsonl(tmp_path / "lines.json", CONVERSATIONS)
    sets = [
        chats_of(tmp_path / "list.json"),
        chats_of(lines),
        chats_of(lines, DataKind.jsonl),
        chats_of(write_parquet(tmp_path / "table.parquet", ROWS)),
    ]
    for chats in sets:
        assert [chats[i] for i in (299, 0, 131)] == [CONVERSATIONS[i] for i in (299, 0, 131)]
        assert chats.digests == sets[0].digests
        assert len(chats) == 300


def test_a_bad_record_is_named_by_its_row(tmp_path):
    rows = [*ROWS[:280], {"messages": talk("a")}]
    with pytest.raises(DataError, match=r"table\.parquet, row 281: no message.*remove the row"):
        chats_of(write_parquet(tmp_path / "table.parquet", rows))
    (tmp_path / "list.json").write_text(json.dumps([{"messages": talk("a", "b")}, {}]))
    with pytest.raises(DataError, match=r"list\.json, record 2: no list 'messages'"):
        chats_of(tmp_path / "list.json")


def test_the_nulls_by_which_a_table_fills_absent_keys_are_absent(tmp_path):
    call = {"function": {"name": "f", "arguments": {"x": 1}}}
    other = {"function": {"name": "g", "arguments": {"y": "2"}}}
    rows = [{"messages": [*talk("a"), {"role": "assistant", "tool_calls": [call, other]}]}]
    conversation = chats_of(write_parquet(tmp_path / "table.parquet", rows))[0]
    arguments = [one["function"]["arguments"] for one in conversation[1]["tool_calls"]]
    assert arguments == [{"x": 1}, {"y": "2"}]
    assert set(conversation[0]) == {"role", "content"}


def test_a_table_without_known_columns_is_refused_with_its_columns(tmp_path):
    with pytest.raises(DataError, match="row 1: columns of no known format.*'text'"):
        chats_of(write_parquet(tmp_path / "table.parquet", [{"text": "Hello"}]))


@pytest.mark.parametrize(
    ("name", "content", "finding"),
    [
        ("a.csv", b"x", r"suffix '\.csv' is none of \.jsonl, \.json, \.parquet"),
        ("a.pkl", pickle.dumps([1]), r"suffix '\.pkl'"),
        ("a.parquet", b"PAR1 and no more", "cannot be read"),
        ("a.parquet", pickle.dumps([1]), "cannot be read"),
        ("a.parquet", b"", "cannot be read"),
        ("a.json", b'[{"messages": []},', "begins like a JSON list and is none"),
        ("a.json", b"[\xff]", "begins like a JSON list and is none"),
        ("a.json", b"[]", "holds no conversation"),
        ("a.json", b"", "holds no conversation"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused_by_name_in_one_paragraph(
    tmp_path, name, content, finding
):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=finding) as refused:
        chats_of(path)
    assert str(path) in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_json_list_too_long_to_hold_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "_MAX_LIST_BYTES", 10)
    (tmp_path / "a.json").write_text("[1,2,3,4,5,6,7]")
    with pytest.raises(DataError, match="Write it as JSONL"):
        chats_of(tmp_path / "a.json")


def test_a_folder_laid_out_like_a_hub_data_set_is_read_by_split(tmp_path):
    write_parquet(tmp_path / "set" / "train.parquet", ROWS[:200])
    write_parquet(tmp_path / "set" / "test.parquet", ROWS[200:])
    parts = [
        open_chats(open_hub(str(tmp_path / "set"), split), RULES) for split in ("train", "test")
    ]
    assert [len(part) for part in parts] == [200, 100]
    assert parts[1][0] == CONVERSATIONS[200]
    with pytest.raises(DataError, match=r"cannot be read.*valid.*data\.hub_split"):
        open_hub(str(tmp_path / "set"), "valid")


def test_a_hub_data_set_of_another_kind_of_files_is_refused(tmp_path):
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "train.pkl").write_bytes(pickle.dumps([1]))
    with pytest.raises(DataError, match=r"data\.hub_id=.*(read as 'pandas'|cannot be read)"):
        open_hub(str(tmp_path / "set"), "train")
    (tmp_path / "set" / "train.csv").write_text("instruction,output\na,b\n")
    (tmp_path / "set" / "train.pkl").unlink()
    with pytest.raises(DataError, match="read as 'csv', and only json and parquet"):
        open_hub(str(tmp_path / "set"), "train")


def test_without_a_network_the_hub_is_named_and_a_way_around_it(monkeypatch):
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"data\.hub_id=nobody/nothing cannot be read") as refused:
        open_hub("nobody/nothing", "train")
    assert "data=files data.path=FILE.parquet" in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_text_that_is_not_utf8_names_its_row(tmp_path):
    texts = [b"fine", b"also", b"\xf5 damaged", b"fine"]
    column = pyarrow.array(texts, pyarrow.binary()).view(pyarrow.string())
    table = pyarrow.table({"instruction": column, "output": ["answer"] * 4})
    pyarrow.parquet.write_table(table, tmp_path / "table.parquet")
    with pytest.raises(DataError, match=r"table\.parquet, row 3: it cannot be decoded.*damaged"):
        chats_of(tmp_path / "table.parquet")
