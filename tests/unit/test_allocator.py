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
LEAVE_HOLES = """
import torch
from paceline.measure.machine import held_memory_bytes
from paceline.train.allocator import give_back_freed_memory, heap_without_holes, keep_freed_memory

told = keep_freed_memory()
MIB = 2**20

def tensor(mib):
    # Its first page and its last one may be there already.
    return torch.ones(mib * MIB + 2 * 4096, dtype=torch.uint8)

def is_between(one):
    return min(t.data_ptr() for t in tensors) < one.data_ptr() < max(t.data_ptr() for t in tensors)

tensors = [tensor(4) for _ in range(20)]
del tensors[1::2]
give_back_freed_memory()
before = held_memory_bytes("cpu")
with heap_without_holes():
    empty = held_memory_bytes("cpu")
    new = [tensor(3), tensor(4)]
    grown = held_memory_bytes("cpu")
    apart = not any(map(is_between, new))
    del new
after = held_memory_bytes("cpu")
again = [tensor(3), tensor(2)]
print(int(told), int(apart), int(all(map(is_between, again))), empty - before, grown - empty, after - before)
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


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_a_heap_grows_as_in_a_new_process_and_then_fills_its_holes_again():
    out = subprocess.run(
        [sys.executable, "-c", LEAVE_HOLES], capture_output=True, text=True, check=True, timeout=120
    )
    told, is_apart, is_between, taken, grown, left = map(int, out.stdout.split())
    if not told:
        pytest.skip("no glibc, or its settings were chosen in the environment")
    if not is_apart:
        pytest.skip("glibc does not tell where it takes memory from")
    assert is_between
    assert taken < 2**20
    assert 7 * 2**20 <= grown < 9 * 2**20
    assert abs(left) < 2**20
