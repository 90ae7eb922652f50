"""Where things are: the shipped conf/ and recipes/ (clone or wheel) and the cache folder."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

CACHE_VARIABLE = "QATLORA_CACHE"


def shipped(name: str) -> Path:
    """`conf`, `recipes` or constraints.txt: inside the package in a wheel, beside it in a clone."""
    in_wheel = _PACKAGE / name
    return in_wheel if in_wheel.exists() else _PACKAGE.parent / name


def cache_folder() -> Path:
    """Folder for unpacked bases, downloaded packages and llama.cpp; moved by QATLORA_CACHE."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qatlora"
