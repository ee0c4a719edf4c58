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
    tensors = [torch.ones(256 * 1024) for _ in range(8)]  # 1 MiB each
    return len(tensors)

for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print(int(told), (resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before) // 10)
"""
PAGES = 8 * 256


def told_and_faults(**environment: str) -> tuple[bool, int]:
    process = subprocess.run(
        [sys.executable, "-c", ALLOCATE_AND_FREE],
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
        env={**os.environ, **environment},
    )
    told, faults = process.stdout.split()
    return bool(int(told)), int(faults)


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_step_does_not_fault_its_memory_in_again():
    told, faults = told_and_faults()
    if not told:
        pytest.skip("no glibc, or its settings were chosen in the environment")
    assert faults < PAGES // 20


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_what_the_user_has_set_stays():
    told, faults = told_and_faults(MALLOC_TRIM_THRESHOLD_="131072", MALLOC_MMAP_THRESHOLD_="131072")
    assert not told
    assert faults > PAGES // 2
