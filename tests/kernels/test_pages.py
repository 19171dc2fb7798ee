"""Freed memory that stays with the process."""

import os
import platform
import subprocess
import sys

import pytest

COUNT = """
import resource, torch
from bitpress.kernels.pages import keep_freed
{keep}
def some():
    parts = [torch.ones(1 << 20) for _ in range(8)]  # 4 MB each
for _ in range(3):
    some()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    some()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def faults(keep: str) -> int:
    """New pages of ten rounds, in a process that maps every large tensor anew unless told otherwise."""
    mapping = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "131072"}
    done = subprocess.run([sys.executable, "-c", COUNT.format(keep=keep)], capture_output=True, text=True, check=True, env=mapping)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc is asked to keep memory")
def test_pages_are_not_made_anew_for_every_tensor():
    plain = faults("")
    assert plain >= 10 * 8 * 2  # what it is there for: at the least a large page for every two megabytes
    assert faults("keep_freed()") < plain / 10
