"""Memory that is kept for the next tensor."""

import ctypes
import subprocess
import sys

import pytest

_FAULTS = """
import resource
from qatlora import memory

def faults_of_16_mib():  # 4,096 pages of 4 KiB
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    taken = b"1" * (16 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with memory.freed_kept():
    faults_of_16_mib()
    print(faults_of_16_mib())
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    """In a process of its own, whose heap nobody has shaped."""
    done = subprocess.run([sys.executable, "-c", _FAULTS], capture_output=True, text=True)
    assert int(done.stdout) < 400, done.stderr
