"""Freed memory is kept: a training step faults its pages in once, not at every step."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

ALLOCATE_AND_FREE = """
import resource, sys
import torch
from paceline.train.allocator import keep_freed_memory

told = keep_freed_memory()

def step():
    tensors = [torch.ones(NUMEL) for _ in range(COUNT)]
    return len(tensors)

for _ in range(10):  # until the heap is as large as it will be
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(told), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""
MIB, PAGES_PER_MIB = 256 * 1024, 256
"""Of float32, and of 4 KiB."""


def told_and_faults(count: int, mib: int, **environment: str) -> tuple[bool, int]:
    """Whether malloc was told, and page faults of a step that has `count` tensors of `mib` MiB."""
    script = ALLOCATE_AND_FREE.replace("NUMEL", str(mib * MIB)).replace("COUNT", str(count))
    process = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    told, faults = process.stdout.split()
    return bool(int(told)), int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
@pytest.mark.parametrize(("count", "mib"), [(8, 1), (2, 40)])
def test_a_step_does_not_fault_its_memory_in_again(count, mib):
    told, faults = told_and_faults(count, mib)
    if not told:
        pytest.skip("no glibc, or its settings were chosen in the environment")
    assert faults < count * mib * PAGES_PER_MIB // 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_what_the_user_has_set_stays():
    told, faults = told_and_faults(8, 1, MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not told
    assert faults > 8 * PAGES_PER_MIB // 2
