"""Memory of this process and of the machine, as the operating system counts it."""

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

# Of glibc's malloc.h. What is larger than 32 MiB, glibc always gives back; of the rest it comes to
# keep twice that by itself.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3
_MMAP_BYTES = 32 << 20
_USUALLY_KEPT_BYTES, _KEPT_BYTES = 64 << 20, 256 << 20


def peak_rss_bytes() -> int:
    """Largest resident set of this process so far; Linux counts in KiB, macOS in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_bytes() -> int:
    """Memory that can be had without swapping."""
    import psutil

    return int(psutil.virtual_memory().available)


def resident_bytes() -> int:
    """Resident set of this process now."""
    import psutil

    return int(psutil.Process().memory_info().rss)


def give_back() -> None:
    """Give freed memory back to the system; glibc would keep hundreds of MB of a dropped model."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc only


@contextlib.contextmanager
def freed_kept() -> Iterator[None]:
    """Keep up to 256 MB of freed memory for the next tensors while this lasts.

    glibc else gives every large tensor back to the system at once, and the next one costs a page
    fault per 4 kB: of a small model's forward on a CPU that is more than a twentieth of the time.
    """
    try:
        set_option = ctypes.CDLL(None).mallopt  # glibc only
    except (OSError, AttributeError):
        yield
        return

    set_option(_M_MMAP_THRESHOLD, _MMAP_BYTES)
    set_option(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    try:
        yield
    finally:
        set_option(_M_TRIM_THRESHOLD, _USUALLY_KEPT_BYTES)


def forget_peak_rss() -> bool:
    """Give free memory back and start counting the high-water mark anew, where Linux allows it.

    Returns:
        False where the mark cannot be reset: `peak_rss_since_forgotten` is then that of the whole
        process so far.
    """
    give_back()
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def peak_rss_since_forgotten() -> int:
    """Largest resident set since `forget_peak_rss`; unlike getrusage not that of a parent."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return peak_rss_bytes()
    (kib,) = (line.split()[1] for line in lines if line.startswith("VmHWM:"))
    return int(kib) * 1024
