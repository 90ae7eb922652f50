"""Records as they stand in files and tables, one by one: JSONL, a JSON list, parquet, a hub id.

Only JSON and tables are read: nothing here unpickles, and no code of a data set is run. JSONL and
tables are read again record by record, so that they may be larger than memory; a JSON list is held.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from qatlora.config import CHAT_SUFFIXES, DataKind
from qatlora.data.formats import COLUMNS
from qatlora.data.messages import MESSAGES_EXAMPLE, Place, shortened
from qatlora.errors import DataError
from qatlora.paths import cache_folder

_MAX_LINE_BYTES = 64 << 20
_MAX_LIST_BYTES = 1 << 30
_ROWS_PER_BATCH = 256
_TABLE_BUILDERS = ("json", "parquet")


class Records(Protocol):
    """A set of JSON values that can be gone through, and read again one by one."""

    @property
    def name(self) -> str:
        """The file's path or the data set's id."""
        ...

    def scan(self) -> Iterator[tuple[Place, int, Any]]:
        """Place, key for `read` and value of each record."""
        ...

    def read(self, key: int, place: Place) -> Any:
        """The record that `scan` gave with this key."""
        ...


@dataclass(frozen=True)
class JsonLines:
    """One JSON value per line; empty lines are passed over. A key is the line's first byte."""

    path: Path

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    def scan(self) -> Iterator[tuple[Place, int, Any]]:
        """See `Records`."""
        offset = number = 0
        with _open(self.path) as handle:
            while line := handle.readline(_MAX_LINE_BYTES + 1):
                number += 1
                place = Place(self.name, "line", number)
                if len(line) > _MAX_LINE_BYTES:
                    place.refuse(
                        f"the line is longer than {_MAX_LINE_BYTES >> 20} MiB, so this is hardly "
                        "JSONL",
                        "Write one conversation per line.",
                    )
                if line.strip():
                    yield place, offset, _parse(line, place)
                offset += len(line)

    def read(self, key: int, place: Place) -> Any:
        """See `Records`."""
        with _open(self.path) as handle:
            handle.seek(key)
            return _parse(handle.readline(_MAX_LINE_BYTES), place)


@dataclass(frozen=True)
class JsonList:
    """A file that is one JSON list; it is held in memory. A key is an index."""

    path: Path

    @property
    def name(self) -> str:
        """The file's path."""
        return str(self.path)

    def scan(self) -> Iterator[tuple[Place, int, Any]]:
        """See `Records`."""
        for index, value in enumerate(self._values):
            yield Place(self.name, "record", index + 1), index, value

    def read(self, key: int, place: Place) -> Any:
        """See `Records`."""
        return self._values[key]

    @cached_property
    def _values(self) -> list[Any]:
        size = self.path.stat().st_size
        if size > _MAX_LIST_BYTES:
            raise DataError(
                f"{self.path} is a JSON list of {size / 1e9:.1f} GB, which would have to be held "
                f"in memory; at most {_MAX_LIST_BYTES >> 30} GiB is read. Write it as JSONL, one "
                "record per line."
            )
        try:
            values = json.loads(self.path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:  # json's and UTF-8's errors are ValueErrors
            raise DataError(
                f"{self.path} begins like a JSON list and is none ({shortened(str(error))}). "
                "Write one whole list of objects, or JSONL, one object per line."
            ) from error
        assert isinstance(values, list), "it begins with a bracket"
        return values


class TableRows:
    """Rows of a table (Arrow, mapped from disk). A key is an index.

    A table has every key in every row, so a null stands where a record had none: nulls are absent.
    """

    def __init__(self, name: str, dataset: Any) -> None:
        self.name = name
        # As Arrow, not decoded: a column of images could name a file or an address to open.
        columns = _known(dataset.column_names)
        self._rows = dataset.select_columns(columns).with_format("arrow")

    def scan(self) -> Iterator[tuple[Place, int, Any]]:
        """See `Records`."""
        for first in range(0, len(self._rows), _ROWS_PER_BATCH):
            last = min(first + _ROWS_PER_BATCH, len(self._rows))
            for index, row in enumerate(self._decoded(first, last), first):
                yield Place(self.name, "row", index + 1), index, _without_nulls(row)

    def read(self, key: int, place: Place) -> Any:
        """See `Records`."""
        [row] = self._decoded(key, key + 1)
        return _without_nulls(row)

    def _decoded(self, first: int, last: int) -> list[Any]:
        try:
            rows: list[Any] = self._rows[first:last].to_pylist()
        except ValueError as error:  # Arrow looks into a text no earlier than here
            if last - first > 1:
                return [self._decoded(index, index + 1)[0] for index in range(first, last)]
            Place(self.name, "row", first + 1).refuse(
                f"it cannot be decoded ({shortened(str(error))})",
                "The table is damaged: take a whole copy, or remove the row.",
            )
        return rows


def open_records(path: Path, kind: DataKind) -> Records:
    """Records of a file: of kind `jsonl` by line, of kind `files` as the file's suffix says.

    Raises:
        DataError: the suffix is unknown, or a table cannot be read.
    """
    suffix = path.suffix.lower()
    if kind is DataKind.jsonl or suffix == ".jsonl":
        return JsonLines(path)
    if suffix == ".json":
        return JsonList(path) if _begins_with_bracket(path) else JsonLines(path)
    if suffix == ".parquet":
        return _open_parquet(path)
    raise DataError(
        f"{path}: the suffix {suffix!r} is none of {', '.join(CHAT_SUFFIXES)}, by which data=files "
        "knows how to read a file. Rename or convert it, or read it as JSONL with data=jsonl."
    )


def open_hub(hub_id: str, split: str) -> Records:
    """Records of a data set on the Hugging Face hub, or of a folder laid out like one.

    Raises:
        DataError: it cannot be reached, has no such split, or is not made of JSON or parquet.
    """
    import datasets

    def load() -> Any:
        builder = datasets.load_dataset_builder(hub_id, cache_dir=str(_tables_folder()))
        kind = builder.info.builder_name
        if kind not in _TABLE_BUILDERS:
            raise DataError(
                f"data.hub_id={hub_id}: its files are read as {kind!r}, and only "
                f"{' and '.join(_TABLE_BUILDERS)} are allowed. Convert it, and use data=files."
            )
        return datasets.load_dataset(hub_id, split=split, cache_dir=str(_tables_folder()))

    remedy = (
        "Check the id and data.hub_split; without a network, take the set's parquet files from a "
        "machine that has one, and use data=files data.path=FILE.parquet."
    )
    return TableRows(f"{hub_id} ({split})", _loaded(load, f"data.hub_id={hub_id}", remedy))


def _open_parquet(path: Path) -> Records:
    import datasets
    import pyarrow.parquet

    def load() -> Any:
        names = pyarrow.parquet.read_schema(path).names
        return datasets.Dataset.from_parquet(
            str(path), columns=_known(names), cache_dir=str(_tables_folder())
        )

    return TableRows(str(path), _loaded(load, str(path), "Give a whole parquet file."))


def _loaded(load: Callable[[], Any], what: str, remedy: str) -> Any:
    """What `load` gives; the many errors of datasets and pyarrow become one."""
    try:
        return load()
    except DataError:
        raise
    except Exception as error:  # datasets raises what it or any library below it likes
        cause = error.__cause__ or error
        reason = shortened(" ".join(str(cause).split()), 200)
        raise DataError(
            f"{what} cannot be read ({type(cause).__name__}: {reason}). {remedy}"
        ) from error


def _tables_folder() -> Path:
    return cache_folder() / "datasets"


def _known(columns: list[str]) -> list[str]:
    """The columns that a format reads; all of them where none does, for the error to name."""
    return [name for name in columns if name in COLUMNS] or columns


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _begins_with_bracket(path: Path) -> bool:
    with _open(path) as handle:
        return handle.read(1024).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"["


def _open(path: Path) -> BinaryIO:
    try:
        return path.open("rb")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        reason = getattr(error, "strerror", None) or error
        raise DataError(
            f"The conversations in {path} cannot be read: {reason}. data.path must name a file, "
            f"for instance JSONL with lines like {MESSAGES_EXAMPLE}."
        ) from error


def _parse(line: bytes, place: Place) -> Any:
    try:
        text = line.decode("utf-8-sig" if place.number == 1 else "utf-8")
    except UnicodeDecodeError as error:
        place.refuse(
            f"byte {error.start} is not UTF-8 text",
            "A compressed or binary file must be unpacked, another encoding converted first.",
        )
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        place.refuse(
            f"not JSON ({error.msg} at column {error.colno}: {shortened(text.strip())!r})",
            "Each line must be one whole JSON object; a list over many lines or an indented object "
            f"must be rewritten as {MESSAGES_EXAMPLE}.",
        )
    except (ValueError, RecursionError) as error:  # an endless number; brackets without end
        place.refuse(
            f"JSON that cannot be read ({shortened(str(error))})", f"Write {MESSAGES_EXAMPLE}."
        )
