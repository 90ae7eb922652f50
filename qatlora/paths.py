"""Where things are: the shipped conf/ and recipes/ (clone or wheel) and the cache folder."""

import os
from pathlib import Path

from qatlora.errors import ConfigError

_PACKAGE = Path(__file__).resolve().parent

CACHE_VARIABLE = "QATLORA_CACHE"


def shipped(name: str) -> Path:
    """`conf`, `recipes` or constraints.txt: inside the package in a wheel, beside it in a clone."""
    in_wheel = _PACKAGE / name
    return in_wheel if in_wheel.exists() else _PACKAGE.parent / name


def user_path(key: str, text: str) -> Path:
    """The path that a setting names, `~` expanded.

    Raises:
        ConfigError: there can be no file or folder of this name, or its folder cannot be entered.
    """
    try:
        path = Path(text).expanduser()
        path.lstat()
    except (FileNotFoundError, NotADirectoryError):
        pass  # whoever needs it to be there says so
    except (OSError, RuntimeError, ValueError) as problem:
        reason = getattr(problem, "strerror", None) or problem
        raise ConfigError(
            f"{key}={text}: this is no usable path ({reason}). Give the path of a file or folder."
        ) from None
    return path


def cache_folder() -> Path:
    """Folder for unpacked bases, downloaded packages and llama.cpp; moved by QATLORA_CACHE."""
    if chosen := os.environ.get(CACHE_VARIABLE):
        return Path(chosen).expanduser().absolute()
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "qatlora"
