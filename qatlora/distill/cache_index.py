"""The index of a teacher cache: what it was made from, and which files it has."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from qatlora import files
from qatlora.errors import CacheError

INDEX = "index.json"
_OWN_SUM = "sha256"
_VERSION = 2


@dataclass(frozen=True)
class CacheKey:
    """What two caches must have in common to be one.

    Attributes:
        teacher: hex SHA-256 over the teacher's tensors (`qatlora.base.digests`).
        is_base: whether the teacher is the base's own checkpoint.
        tokenizer: hex digest of the vocabulary.
        template: hex digest of the chat template that renders the rows.
        vocab_size: words of the teacher's head.
        temperature: of the softmax.
        top_k: words kept per token.
    """

    teacher: str
    is_base: bool
    tokenizer: str
    template: str
    vocab_size: int
    temperature: float
    top_k: int


@dataclass(frozen=True)
class CacheIndex:
    """The content of index.json.

    Attributes:
        key: what it was made from.
        teacher_name: how people call the teacher.
        made_for: the settings of the last run that it was written for, to explain missing rows.
        shards: file of rows -> number of its scored tokens.
        sums: file -> its SHA-256, of every file of the cache.
        texts: keys of the held-out texts.
        softcap: of the teacher's head.
    """

    key: CacheKey
    teacher_name: str
    made_for: dict[str, Any] = field(default_factory=dict)
    shards: dict[str, int] = field(default_factory=dict)
    sums: dict[str, str] = field(default_factory=dict)
    texts: list[str] = field(default_factory=list)
    softcap: float | None = None

    def write(self, folder: Path) -> None:
        """Write index.json, whole or not at all."""
        content = {"version": _VERSION} | dataclasses.asdict(self)
        files.write_json(folder / INDEX, content | {_OWN_SUM: _sum_of(content)})


def read_index(folder: Path) -> CacheIndex:
    """Read and check index.json.

    Raises:
        CacheError: there is none, another version wrote it, or it is damaged.
    """
    path = folder / INDEX
    if not path.is_file():
        raise CacheError(
            f"{folder} holds no teacher cache: there is no {INDEX}. Give teacher.path=FOLDER that "
            "recipe=teacher_cache has written."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found, recorded = _sum_of(content), content.pop(_OWN_SUM, None)
        version = content.pop("version")
        index = CacheIndex(**content | {"key": CacheKey(**content["key"])})
    except (ValueError, TypeError, KeyError, AttributeError) as problem:
        raise CacheError(
            f"{path} is no index of a teacher cache ({type(problem).__name__}: {problem}). It is "
            "damaged or was edited: write the cache again."
        ) from None
    if version != _VERSION:
        raise CacheError(
            f"{folder} is a teacher cache of version {version}, and this qatlora reads {_VERSION}. "
            "Write it again with recipe=teacher_cache."
        )
    if found != recorded:
        raise CacheError(
            f"{path} does not have the SHA-256 that it names: it is damaged or was edited. Copy "
            "the cache again, or write it again with recipe=teacher_cache."
        )
    return index


def _sum_of(content: dict[str, Any]) -> str:
    """Hex SHA-256 of an index but for its own sum."""
    rest = {key: value for key, value in content.items() if key != _OWN_SUM}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def require_same(folder: Path, found: CacheKey, wanted: CacheKey) -> None:
    """Refuse a cache that was made from something else.

    Raises:
        CacheError: names every part that differs.
    """
    pairs = (dataclasses.asdict(key) for key in (found, wanted))
    differing = [
        f"{name} {_short(ours)} there, {_short(theirs)} here"
        for (name, ours), theirs in zip(next(pairs).items(), next(pairs).values(), strict=True)
        if ours != theirs
    ]
    if differing:
        raise CacheError(
            f"The teacher cache in {folder} was made from something else: {'; '.join(differing)}. "
            "Use the settings that it was written with, or write another one with "
            "recipe=teacher_cache teacher.cache_path=OTHER_FOLDER."
        )


def _short(value: object) -> str:
    """A digest needs no more than its beginning to be told from another."""
    return str(value)[:16]
