"""A run's folder belongs to one process at a time, and begins without leftovers of a killed one."""

import contextlib
import fcntl
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from qatlora.errors import RunFolderError

_LOCK = ".lock"
_PARTS = (".*.partial", ".*.removed", ".candidate", ".merged-*")
"""What `qatlora.files` and the export write before they rename it, and a merge that is judged."""


@contextlib.contextmanager
def claimed(run_dir: Path) -> Iterator[None]:
    """Make the folder and hold it until the end.

    The lock is the kernel's, on a file that names the holder's process: it ends with that process,
    however that ends, so no lock is ever stale. The file itself stays.

    Raises:
        RunFolderError: another process holds the folder.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    with (run_dir / _LOCK).open("a+", encoding="utf-8") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            raise RunFolderError(
                f"{run_dir} is in use by process {lock.read() or '(unknown)'}: a run folder takes "
                "one run at a time. Wait for it, end it, or set run_dir to another folder."
            ) from None
        lock.truncate(0)
        lock.write(str(os.getpid()))
        lock.flush()
        _remove_leftovers(run_dir)
        yield


def _remove_leftovers(run_dir: Path) -> None:
    """Remove parts that a killed run had not yet renamed; hidden files of others stay."""
    for path in (one for pattern in _PARTS for one in run_dir.glob(pattern)):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
