"""Where things are: the shipped conf/ and recipes/ (clone or wheel) and the cache folder."""

import os
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent

CACHE_VARIABLE = "QATLORA_CACHE"


def shipped(folder: str) -> Path:
    """Folder `conf` or `recipes`: inside the package in a wheel, beside it in a clone."""
    in_wheel = _PACKAGE / folder
    return in_wheel if in_wheel.is_dir() else _PACKAGE.parent / folder


def cache_folder() -> Path:
    """Folder for unpacked bases, downloaded packages and llama.cpp; moved by QATLORA_CACHE."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qatlora"
