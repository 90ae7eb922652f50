"""Files that are either whole or absent: written beside their place, synced, then renamed.

What gets its name may be read by whom the umask says: safetensors and `tempfile` write for their
owner alone, and a run folder or a cache may be shared with colleagues.
"""

import contextlib
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SUMS = "SHA256SUMS"
"""What a folder says of its files, one line each, as `sha256sum -c` reads it."""

_CHUNK_BYTES = 1 << 20
_READ_AND_WRITE = 0o666  # a program's right to be executed is kept besides


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it and rename it to `path`.

    A killed process leaves at most a file with the suffix ``.partial``, never half a file at the
    final path.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield partial
        finish(partial)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replacing_folder(path: Path) -> Iterator[Path]:
    """Yield a temporary folder beside `path`; on success `move_folder` it to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        move_folder(partial, path)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def move_folder(partial: Path, path: Path) -> None:
    """`finish` every file of `partial` and rename it to `path`, in place of what was there."""
    for written in partial.rglob("*"):
        if written.is_file() and not written.is_symlink():
            finish(written)
    if path.exists():
        remove_folder(path)
    partial.replace(path)


def finish(written: Path) -> None:
    """Before a file gets its name: open it to whom the umask says, and sync it."""
    os.umask(umask := os.umask(0o077))  # it cannot be read without being set
    with contextlib.suppress(PermissionError):  # of a file system that knows no modes
        written.chmod((written.stat().st_mode | _READ_AND_WRITE) & ~umask)
    with written.open("rb") as handle:
        os.fsync(handle.fileno())


def remove_folder(path: Path) -> None:
    """Remove a folder that is never seen half removed: it is renamed first."""
    removed = path.with_name(f".{path.name}.{os.getpid()}.removed")
    path.rename(removed)
    shutil.rmtree(removed)


def write_text(path: Path, text: str) -> None:
    """Write `text` (UTF-8) so that `path` is either the old file or the whole new one."""
    with replacing(path) as partial:
        partial.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON; NaN and infinity are refused, as JSON has neither."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def write_sums(folder: Path) -> None:
    """Record the SHA-256 of every file in `folder`, but of cards (.md), which people may edit."""
    paths = sorted(path for path in folder.iterdir() if path.is_file() and path.suffix != ".md")
    lines = [f"{sha256_of_file(path)}  {path.name}\n" for path in paths]
    (folder / SUMS).write_text("".join(lines), encoding="utf-8")


def broken_sum(folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> str | None:
    """What differs between a folder and its sums, for an error; None where nothing does.

    Args:
        folder: one without sums is as it is: nothing can be told of it.
        wanted: names of the files to look at.
    """
    if not (folder / SUMS).is_file():
        return None
    for line in (folder / SUMS).read_text("utf-8", errors="replace").splitlines():
        recorded, _, name = line.partition("  ")
        if not name or Path(name).name != name:
            return f"{folder / SUMS} holds {line[:80]!r}, which is no sum of a file in its folder"
        if not wanted(name):
            continue
        found = sha256_of_file(folder / name) if (folder / name).is_file() else "none"
        if found != recorded:
            return f"{folder / name} has the SHA-256 {found}, and {SUMS} beside it says {recorded}"
    return None


def sha256_of_file(path: Path) -> str:
    """Hex SHA-256 of the file's bytes, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
