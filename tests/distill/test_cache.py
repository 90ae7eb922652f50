"""A teacher cache on disk: what is written is read, what is broken or foreign is refused."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from qatlora.distill import CacheKey, CacheWriter, LmHead, TeacherCache, TopWords
from qatlora.distill.cache import bytes_per_token
from qatlora.errors import CacheError

KEY = CacheKey("a" * 64, True, "b" * 64, "c" * 64, vocab_size=200_000, temperature=1.0, top_k=5)


def row(num_tokens: int, seed: int, vocab_size: int = KEY.vocab_size) -> TopWords:
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(0, vocab_size, (num_tokens, 5), generator=generator).int()
    words[0, 0] = vocab_size - 1
    log_probs = -torch.rand(num_tokens, 5, generator=generator).half()
    return TopWords(words, log_probs, log_probs[:, 0] - 3, vocab_size, 1.0)


def row_key(number: int) -> bytes:
    return number.to_bytes(16, "big")


def writer_of(folder: Path, key: CacheKey = KEY) -> CacheWriter:
    return CacheWriter(folder, key, "big", {"seed": 1})


def filled(folder: Path, numbers: range, key: CacheKey = KEY) -> TeacherCache:
    writer = writer_of(folder, key)
    for number in numbers:
        writer.add({row_key(number): row(3 + number, number, key.vocab_size)})
    writer.flush()
    return TeacherCache(folder)


def same(one: TopWords, other: TopWords) -> bool:
    pairs = zip(vars(one).values(), vars(other).values(), strict=True)
    return all(torch.equal(a, b) if torch.is_tensor(a) else a == b for a, b in pairs)


@pytest.mark.parametrize("vocab_size", [200_000, 65_536, 300])
def test_rows_are_read_as_they_were_written_from_any_shard(vocab_size, tmp_path, monkeypatch):
    monkeypatch.setattr("qatlora.distill.cache._SHARD_TOKENS", 10)
    key = dataclasses.replace(KEY, vocab_size=vocab_size)
    cache = filled(tmp_path, range(6), key)
    assert len(cache.index.shards) == 3
    for number in (5, 0, 3):
        assert same(cache.row(row_key(number)), row(3 + number, number, vocab_size))
    assert cache.num_tokens([row_key(2), row_key(4)]) == 5 + 7


@pytest.mark.parametrize("vocab_size", [200_000, 300])
def test_a_token_takes_the_bytes_that_are_said(vocab_size, tmp_path):
    def size(num_tokens: int) -> int:
        folder = tmp_path / str(num_tokens)
        writer = writer_of(folder, dataclasses.replace(KEY, vocab_size=vocab_size))
        writer.add({row_key(0): row(num_tokens, 0, vocab_size)})
        writer.flush()
        return (folder / "rows-00001.safetensors").stat().st_size

    # headers are padded to 8 bytes, and their offsets have more digits
    assert size(2000) - size(1000) == pytest.approx(1000 * bytes_per_token(5, vocab_size), abs=32)


def test_rows_are_added_and_earlier_ones_stay(tmp_path):
    filled(tmp_path, range(3))
    cache = filled(tmp_path, range(3, 5))
    assert cache.missing(map(row_key, range(7))) == [row_key(5), row_key(6)]
    assert same(cache.row(row_key(1)), row(4, 1))
    assert same(cache.row(row_key(4)), row(7, 4))


def test_head_and_texts_are_read_as_they_were_written(tmp_path):
    writer = writer_of(tmp_path)
    head = LmHead(torch.randn(9, 4).bfloat16(), torch.randn(9), 30.0)
    hidden, targets = torch.randn(6, 4).bfloat16(), torch.arange(6)
    writer.add_head(head)
    writer.add_text("ab", hidden, targets)
    cache = TeacherCache(tmp_path)
    read = cache.head(torch.device("cpu"))
    assert torch.equal(read.weight, head.weight)
    assert torch.equal(read.bias, head.bias)
    assert read.softcap == 30.0
    assert all(map(torch.equal, cache.text("ab"), (hidden, targets)))
    assert cache.text("other") is None


def test_a_shard_that_the_index_does_not_name_does_not_count(tmp_path):
    filled(tmp_path, range(2))
    (tmp_path / "rows-00002.safetensors").write_bytes(b"cut off")
    cache = filled(tmp_path, range(2, 4))
    assert not cache.missing(map(row_key, range(4)))


@pytest.mark.parametrize(
    ("name", "value"), [("teacher", "d" * 64), ("temperature", 2.0), ("top_k", 64)]
)
def test_a_cache_made_from_something_else_is_not_added_to(name, value, tmp_path):
    filled(tmp_path, range(2))
    with pytest.raises(CacheError, match=f"made from something else: {name} "):
        writer_of(tmp_path, dataclasses.replace(KEY, **{name: value}))


def test_a_row_that_is_not_there_is_named(tmp_path):
    with pytest.raises(CacheError, match=row_key(9).hex()):
        filled(tmp_path, range(2)).row(row_key(9))


def test_a_head_that_was_written_just_before_a_kill_is_written_again(tmp_path):
    head = LmHead(torch.randn(9, 4).bfloat16(), None, softcap=30.0)
    writer_of(tmp_path)
    (tmp_path / "head.safetensors").write_bytes(b"whole, but the index does not know it")
    writer_of(tmp_path).add_head(head)
    read = TeacherCache(tmp_path).head(torch.device("cpu"))
    assert read.softcap == 30.0
    assert torch.equal(read.weight, head.weight)


def test_no_index_a_damaged_one_and_another_version_are_refused(tmp_path):
    with pytest.raises(CacheError, match="holds no teacher cache"):
        TeacherCache(tmp_path)
    filled(tmp_path, range(2))
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 99}))
    with pytest.raises(CacheError, match="version 99"):
        TeacherCache(tmp_path)
    path.write_text(json.dumps(content)[:-40])
    with pytest.raises(CacheError, match="damaged"):
        TeacherCache(tmp_path)


def test_a_truncated_shard_is_refused_when_the_cache_is_opened(tmp_path):
    filled(tmp_path, range(2))
    path = tmp_path / "rows-00001.safetensors"
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(CacheError, match="rows-00001"):
        TeacherCache(tmp_path)
