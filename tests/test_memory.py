"""Memory that is kept for the next tensor."""

import ctypes
import resource

import pytest
import torch

from qatlora import memory


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="not glibc")
def test_memory_that_was_freed_is_used_again_without_page_faults():
    def faults_of_a_tensor() -> int:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        torch.ones(4 << 20)  # 16 MiB: 4,096 pages of 4 KiB
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

    with memory.freed_kept():
        faults_of_a_tensor()
        assert faults_of_a_tensor() < 400
