"""A chat template is tried in a child process first.

transformers' sandbox keeps a template from Python's inside and from files, but bounds neither time
nor memory: two loops of 100,000 turns, `9 ** (9 ** 9)` or a text times 10 billion never come back.
"""

import multiprocessing
import os
import resource
import sys
from collections.abc import Callable
from pathlib import Path

from qatlora.errors import DataError

_CPU_SECONDS = 3  # the probes of published templates take some milliseconds
_MEMORY_BYTES = 1 << 30  # beside what the process has
_WALL_SECONDS = 120.0


def require_end(render: Callable[[], object], template: str) -> None:
    """Check that `render` comes to an end, with a text or an exception.

    Raises:
        DataError: it needs more time or memory than any template for chats.
    """
    if sys.platform != "linux":  # elsewhere a fork of a process with threads is not safe
        return
    child = multiprocessing.get_context("fork").Process(target=_limited, args=(render,))
    child.start()
    child.join(_WALL_SECONDS)  # the kernel ends it, unless it uses no time at all:
    if (
        child.is_alive()
    ):  # a lock of another thread was taken over; of the template nothing is known
        child.kill()
        child.join()
        return
    if child.exitcode != 0:
        raise DataError(
            f"The chat template (it begins {template.strip()[:60]!r}) does not end: a handful of "
            f"short conversations took more than {_CPU_SECONDS} s or {_MEMORY_BYTES >> 30} GiB. "
            "Correct chat_template.jinja in the checkpoint's folder, or do not trust the folder."
        )


def _limited(render: Callable[[], object]) -> None:
    """Render within the limits; what else goes wrong is met, and told, by the parent."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_SECONDS, _CPU_SECONDS + 1))
    statm = Path("/proc/self/statm")
    if statm.is_file():
        in_use = int(statm.read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (in_use + _MEMORY_BYTES,) * 2)
    try:
        render()
    except MemoryError:
        os._exit(1)
    except Exception as error:
        os._exit(1 if isinstance(error.__cause__, MemoryError) else 0)
    os._exit(0)
