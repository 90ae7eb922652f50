"""A teacher on disk: its likeliest words for rows of tokens, so that it need not be in memory.

    index.json               what the cache was made from, its files, what it was made for
    rows-00001.safetensors   the scored tokens of some rows, one after the other:
        log_probs   float16 [n, k]    likeliest word first
        rest        float16 [n]       log of the mass of all other words
        words_low   uint16 [n, k]     word & 0xFFFF
        words_high  uint8 [n, k]      word >> 16; absent where no word needs it
        keys        uint8 [r, 16]     digest of each row's tokens and labels
        counts      int32 [r]         its scored tokens
    text-KEY.safetensors     hidden [n, H] and targets [n] of a held-out text
    head.safetensors         the teacher's head, to score held-out text in full

A row is found by the digest of its tokens and labels, so a cache serves every run whose rows it
has, in whatever order and however batched. Writing adds the rows that are missing: that is how a
killed build goes on, and how a longer run extends a cache. A file is whole or absent, and counts
once the index names it.

Why so: docs/decisions/0010-a-teacher-cache-is-keyed-by-rows.md.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from qatlora import files
from qatlora.distill.cache_index import INDEX, CacheIndex, CacheKey, read_index, require_same
from qatlora.distill.head import LmHead
from qatlora.distill.top_words import TopWords
from qatlora.errors import CacheError

_HEAD = "head.safetensors"
_HIGH_FROM = 1 << 16
_SHARD_TOKENS = 32_768  # what a killed build loses at most: minutes of a small model on a CPU


class _Place(NamedTuple):
    """Where a row lies: its tokens are first .. stop of a file."""

    path: Path
    first: int
    stop: int


class TeacherCache:
    """Reads a cache; only what is asked for is in memory."""

    def __init__(self, folder: Path) -> None:
        """Read the index and the keys of all rows; every file is read once, for its SHA-256.

        Raises:
            CacheError: there is no cache, another version wrote it, or a file is damaged.
        """
        self.folder = folder
        self.index = read_index(folder)
        self._require_sums()
        self._places: dict[bytes, _Place] = {}
        for name in self.index.shards:
            self._take_in(folder / name)

    def _require_sums(self) -> None:
        sums = dict.fromkeys(self.index.shards) | self.index.sums
        for name, recorded in sums.items():
            path = self.folder / name
            if Path(name).name != name:
                raise _damaged(path, "it lies outside of the cache")
            if not path.is_file():
                raise _damaged(path, "there is no such file")
            if (found := files.sha256_of_file(path)) != recorded:
                raise _damaged(path, f"its SHA-256 is {found}, and the index says {recorded}")

    def _take_in(self, path: Path) -> None:
        with _opened(path) as opened:
            keys, counts = opened.get_tensor("keys"), opened.get_tensor("counts")
        first = 0
        for key, count in zip(keys, counts.tolist(), strict=True):
            self._places[bytes(key.tolist())] = _Place(path, first, first + count)
            first += count

    def missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The keys of rows that it does not hold."""
        return [key for key in keys if key not in self._places]

    def num_tokens(self, keys: Iterable[bytes]) -> int:
        """Scored tokens of rows that it holds."""
        return sum(self._places[key].stop - self._places[key].first for key in keys)

    def row(self, key: bytes) -> TopWords:
        """The scored tokens of one row, in order.

        Raises:
            CacheError: the row is not there.
        """
        if key not in self._places:
            raise CacheError(
                f"{self.folder} has no row with the digest {key.hex()}, which this step trains on. "
                "Add it: run recipe=teacher_cache with the settings of this run."
            )
        path, first, stop = self._places[key]
        part, made = slice(first, stop), self.index.key
        with _opened(path) as opened:
            words = opened.get_slice("words_low")[part].int()
            if "words_high" in opened.keys():  # noqa: SIM118 - safe_open is no mapping
                words |= opened.get_slice("words_high")[part].int() << 16
            log_probs = opened.get_slice("log_probs")[part]
            rest = opened.get_slice("rest")[part]
        return TopWords(words, log_probs, rest, made.vocab_size, made.temperature)

    def head(self, device: torch.device) -> LmHead:
        """The teacher's head."""
        tensors = _load(self.folder / _HEAD, device)
        return LmHead(tensors["weight"], tensors.get("bias"), self.index.softcap)

    def text(self, key: str) -> tuple[Tensor, Tensor] | None:
        """(hidden [n, H], targets [n]) of a held-out text, None where it has not been kept."""
        if key not in self.index.texts:
            return None
        tensors = _load(self.folder / _text_file(key), torch.device("cpu"))
        return tensors["hidden"], tensors["targets"]


class CacheWriter:
    """Adds rows and texts to a cache, new or not; what is in it already stays.

    Attributes:
        key: what the cache is made from.
    """

    def __init__(
        self, folder: Path, key: CacheKey, teacher_name: str, made_for: Mapping[str, Any]
    ) -> None:
        """Open or begin a cache.

        Raises:
            CacheError: the folder holds a cache made from something else, or a damaged one.
        """
        self.key = key
        self._folder = folder
        index = CacheIndex(key, teacher_name)
        if (folder / INDEX).is_file():
            index = read_index(folder)
            require_same(folder, index.key, key)
        self._index = index
        self._keys: list[bytes] = []
        self._rows: list[TopWords] = []
        self._record(made_for=dict(made_for))

    def add(self, rows: Mapping[bytes, TopWords]) -> None:
        """The rows of a micro-batch by key; they may be written now or later.

        A file ends between micro-batches, so that a killed build goes on with the same ones.
        """
        self._keys += rows.keys()
        self._rows += rows.values()
        if sum(len(waiting.rest) for waiting in self._rows) >= _SHARD_TOKENS:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        if not self._rows:
            return
        number = len(self._index.shards) + 1
        name = f"rows-{number:05d}.safetensors"
        counts = [len(row.rest) for row in self._rows]
        tensors = {
            "log_probs": torch.cat([row.log_probs for row in self._rows]),
            "rest": torch.cat([row.rest for row in self._rows]),
            "keys": torch.tensor([list(key) for key in self._keys], dtype=torch.uint8),
            "counts": torch.tensor(counts, dtype=torch.int32),
        }
        words = torch.cat([row.words for row in self._rows])
        tensors["words_low"] = (words & 0xFFFF).to(torch.uint16)
        if self.key.vocab_size > _HIGH_FROM:
            tensors["words_high"] = (words >> 16).to(torch.uint8)
        self._save(name, tensors, shards=self._index.shards | {name: sum(counts)})
        self._keys, self._rows = [], []

    def add_head(self, head: LmHead) -> None:
        """The teacher's head; written once."""
        if _HEAD in self._index.sums:
            return
        bias = {} if head.bias is None else {"bias": head.bias.cpu()}
        self._save(_HEAD, {"weight": head.weight.cpu()} | bias, softcap=head.softcap)

    def add_text(self, key: str, hidden: Tensor, targets: Tensor) -> None:
        """A held-out text's final hidden states [n, H] and scored words [n]."""
        tensors = {"hidden": hidden, "targets": targets}
        self._save(_text_file(key), tensors, texts=[*self._index.texts, key])

    def _save(self, name: str, tensors: dict[str, Tensor], **changes: Any) -> None:
        """Write a file, then let the index say so."""
        path = self._folder / name
        with files.replacing(path) as partial:
            save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, partial)
        self._record(sums=self._index.sums | {name: files.sha256_of_file(path)}, **changes)

    def _record(self, **changes: Any) -> None:
        """Let the index say what has just been written."""
        self._index = dataclasses.replace(self._index, **changes)
        self._index.write(self._folder)


def bytes_per_token(top_k: int, vocab_size: int) -> int:
    """Size of a scored token on disk; a row adds 20 bytes."""
    of_word = 4 if vocab_size <= _HIGH_FROM else 5
    return of_word * top_k + 2


def _text_file(key: str) -> str:
    return f"text-{key}.safetensors"


def _load(path: Path, device: torch.device) -> dict[str, Tensor]:
    try:
        return load_file(path, device=str(device))
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, problem) from None


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as problem:
        raise _damaged(path, problem) from None


def _damaged(path: Path, problem: Exception | str) -> CacheError:
    return CacheError(
        f"{path} is missing or damaged ({problem}). Copy the cache again, or "
        "write it again with recipe=teacher_cache."
    )
