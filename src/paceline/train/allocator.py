"""Keeping freed memory for the next step, instead of giving it back to the system after each."""

from __future__ import annotations

import ctypes
import os
import sys

import torch

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER_TRIM_BYTES = (1 << 31) - 1
_SETTINGS_OF_THE_USER = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES", "LD_PRELOAD")


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
    if sys.platform != "linux" or any(name in os.environ for name in _SETTINGS_OF_THE_USER):
        return False
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "gnu_get_libc_version"):
        return False
    told = libc.mallopt(_M_MMAP_MAX, 0)
    return bool(told and libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM_BYTES))
