"""A folder belongs to one writer at a time, and begins without leftovers of a killed one."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qatlora.errors import RunFolderError

_LOCK = ".lock"
_CACHE_LOCK = ".cache.lock"
"""Another file, as a cache may lie in the run folder itself."""
_PARTS = (".*.partial", ".*.removed", ".candidate", ".merged-*", ".llama_cpp-*")
"""What `qatlora.files` and the export write before they rename it, and what is only judged."""


def claimed(run_dir: Path) -> contextlib.AbstractContextManager[None]:
    """Make a run's folder and hold it until the end.

    Raises:
        RunFolderError: another process holds the folder.
    """
    rule = "a run folder takes one run at a time. Wait for it, end it, or set run_dir to"
    return _held(run_dir, _LOCK, rule)


def claimed_cache(folder: Path) -> contextlib.AbstractContextManager[None]:
    """Make the folder of a teacher cache and hold it while writing; its readers need no lock.

    Raises:
        RunFolderError: another process writes to the cache.
    """
    rule = "a teacher cache has one writer at a time. Wait for it, end it, or set "
    return _held(folder, _CACHE_LOCK, rule + "teacher.cache_path to")


@contextlib.contextmanager
def _held(folder: Path, name: str, rule: str) -> Iterator[None]:
    """Hold a folder by the file `name` in it.

    The lock is the kernel's, on a file that names the holder's process: it ends with that process,
    however that ends, so no lock is ever stale. The file itself stays.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / name).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunFolderError(
                f"{folder} is in use by process {lock.read() or '(unknown)'}: {rule} another "
                "folder."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _remove_leftovers(folder)
        yield


def _remove_leftovers(folder: Path) -> None:
    """Remove parts that a killed run had not yet renamed; hidden files of others stay."""
    for path in (one for pattern in _PARTS for one in folder.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
