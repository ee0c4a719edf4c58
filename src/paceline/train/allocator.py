"""Keeping freed memory for the next step, instead of giving it back to the system after each."""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
from collections.abc import Iterator

import torch

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4
_NEVER_TRIM_BYTES = (1 << 31) - 1
_LEAST_HOLE_BYTES, _MAPPINGS = 64 << 10, 1 << 16
_SETTINGS_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")
_keeps = False
"""Whether this process was told to."""


def give_back_freed_memory() -> None:
    """Have glibc's malloc return to the system what is free now, and torch to its GPU: after much was needed once."""
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
        libc.malloc_trim(0)


def keep_freed_memory() -> bool:
    """Have glibc's malloc keep what is freed; whether it was told so.

    A training step allocates and frees the same tensors over and over. As malloc comes, it returns
    much of that to the kernel, which hands it out again page by page, zeroed: thousands of page faults a
    step. Keeping it saved a seventh to a third of the step of several jobs, most where gradients are large
    (docs/log.md); what is freed stays with the process. It holds for the whole process.

    No tensor gets a mapping of its own, as glibc would give each above 32 MiB whatever it is told otherwise.

    Nothing is changed where the user chose an allocator or its settings, or where there is no glibc.
    """
    global _keeps
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS_OF_THE_USER):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    told = libc.mallopt(_M_MMAP_MAX, 0)
    _keeps = bool(told and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES))
    return _keeps


class _MallInfo(ctypes.Structure):
    """Of malloc.h: `mallinfo2`, since glibc 2.33."""

    _fields_ = tuple(
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    )  # fmt: skip


@contextlib.contextmanager
def heap_without_holes() -> Iterator[None]:
    """Have nothing put between what is in use already, so that the heap grows as in a process that has just begun.

    What was large once leaves holes behind, and the next model's tensors fit into them badly: it comes to hold more
    than it would in a process of its own (docs/decisions/0025). Meanwhile the holes are taken, at the price of their
    first pages.

    Nothing is done where freed memory is not kept, or glibc does not tell where it takes memory from.
    """
    if not _keeps or not hasattr(libc := ctypes.CDLL(None), "mallinfo2"):
        yield
        return
    libc.mallinfo2.restype = _MallInfo
    libc.malloc.argtypes, libc.malloc.restype = (ctypes.c_size_t,), ctypes.c_void_p
    libc.free.argtypes, libc.free.restype = (ctypes.c_void_p,), None
    give_back_freed_memory()
    taken = _take_holes(libc)
    give_back_freed_memory()
    try:
        yield
    finally:
        for address in taken:
            libc.free(address)
        give_back_freed_memory()


def _take_holes(libc: ctypes.CDLL) -> list[int]:
    """Addresses that malloc gave without asking the system for more, from large to small until there are none."""

    def asked_for() -> tuple[int, int]:
        """Bytes of the heap, and mappings beside it."""
        told = libc.mallinfo2()
        return told.arena, told.hblks

    taken = []
    # What does not fit into a hole gets a mapping of its own, and so is told from what does.
    libc.mallopt(_M_MMAP_THRESHOLD, _LEAST_HOLE_BYTES)
    libc.mallopt(_M_MMAP_MAX, _MAPPINGS)
    try:
        size = 1 << max(libc.mallinfo2().fordblks.bit_length() - 1, 0)
        while size >= _LEAST_HOLE_BYTES:
            before = asked_for()
            address = libc.malloc(size)
            if address and asked_for() == before:
                taken.append(address)
                continue
            libc.free(address)
            size //= 2
    finally:
        libc.mallopt(_M_MMAP_MAX, 0)
    return taken
