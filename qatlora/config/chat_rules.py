"""The rules of where conversations come from: each kind of data has its own keys."""

import math
from pathlib import Path

from qatlora.config import CHAT_SUFFIXES, ChatFormat, DataConfig, DataKind
from qatlora.errors import ConfigError

_KEYS_OF_KIND = {
    DataKind.chitchat: (),
    DataKind.jsonl: ("data.path", "data.paths"),
    DataKind.files: ("data.path", "data.paths"),
    DataKind.hub: ("data.hub_id",),
}
_TABLES_OF_TEXT = (".csv", ".tsv")
_WHERE_FROM = {
    DataKind.chitchat: (
        "that set comes from a package and reads no file. Add data=jsonl, data=files or data=hub, "
        "or leave the key out."
    ),
    DataKind.jsonl: "give data.path=FILE.jsonl, or several files as data.paths=[FILE,FILE].",
    DataKind.files: "give data.path=FILE, or several files as data.paths=[FILE,FILE].",
    DataKind.hub: "give data.hub_id=OWNER/NAME and nothing else; files are read by data=files.",
}


def check_chat_source(data: DataConfig) -> None:
    """Refuse a key of another kind, which would be passed over, and files that cannot be read.

    Raises:
        ConfigError: with key, rule and remedy.
    """
    kind = data.kind.name
    given = {"data.path": data.path, "data.paths": data.paths, "data.hub_id": data.hub_id}
    allowed = _KEYS_OF_KIND[data.kind]
    for key, value in given.items():
        if value and key not in allowed:
            raise ConfigError(f"{key}={value} with data={kind}: {_WHERE_FROM[data.kind]}")
    chosen = [key for key in allowed if given[key]]
    if allowed and len(chosen) != 1:
        found = f"{' and '.join(chosen)} together" if chosen else f"without {' or '.join(allowed)}"
        raise ConfigError(f"data={kind} {found}: {_WHERE_FROM[data.kind]}")
    if data.kind is DataKind.chitchat and data.format is not ChatFormat.auto:
        raise ConfigError(
            f"data.format={data.format.name} with data=chitchat: {_WHERE_FROM[data.kind]}"
        )
    for path in [data.path] if data.path else data.paths:
        _check_chat_file(path, data.kind)
    if len(set(data.paths)) < len(data.paths):
        raise ConfigError(
            f"data.paths={data.paths}: a file is named twice. Give each once; data.weights says "
            "how much of it is used."
        )
    if data.weights and len(data.weights) != len(data.paths):
        raise ConfigError(
            f"data.weights={data.weights} for {len(data.paths)} files in data.paths: there must be "
            "one weight per file. Give as many, or none for their numbers of conversations."
        )
    if not all(math.isfinite(weight) and weight > 0 for weight in data.weights):
        raise ConfigError(
            f"data.weights={data.weights}: each must be greater than 0. Raise it, or leave the "
            "file out."
        )


def _check_chat_file(path: str, kind: DataKind) -> None:
    if not Path(path).is_file():
        found = "a folder" if Path(path).is_dir() else "no such file"
        raise ConfigError(
            f"data.path={path}: {found}. Give a JSONL file with one "
            '{"messages": [...]} per line, or another that data=files reads.'
        )
    if Path(path).suffix.lower() in _TABLES_OF_TEXT:
        raise ConfigError(
            f"data.path={path}: CSV is not read, as it has neither types nor turns. Convert it by "
            "pandas.read_csv(FILE).to_json('chats.jsonl', orient='records', lines=True), with the "
            "columns of one layout in docs/data.md, and give data=files data.path=chats.jsonl."
        )
    if kind is DataKind.files and Path(path).suffix.lower() not in CHAT_SUFFIXES:
        raise ConfigError(
            f"data.path={path}: data=files knows a file by its suffix, one of "
            f"{', '.join(CHAT_SUFFIXES)}. Rename or convert it, or use data=jsonl."
        )
