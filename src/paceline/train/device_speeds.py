"""How fast this device computes, and moves memory, as seen by real operations."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median

import torch

from paceline.train.passes import GoOn

MOVED_BYTES = 32 << 20
"""Of the tensors that are added and copied: more than the caches hold, as gradients of a large model are."""
_SIZE = {"cpu": 1024, "cuda": 8192}
"""Of the square matrices whose product is timed: large enough for the device's best speed."""


def product_flops_per_s(
    device: torch.device, go_on: GoOn = bool, dtype: torch.dtype = torch.float32
) -> float:
    """Floating-point operations a second of a product of two large square matrices: the median of a few.

    Args:
        go_on: lets several workers begin each product together.
    """
    size = _SIZE.get(device.type, 1024)
    one, other = (torch.rand(size, size, device=device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / _seconds(device, lambda: torch.mm(one, other), go_on, times=12)


def addition_s(device: torch.device, go_on: GoOn = bool) -> float:
    """Seconds to add two tensors of `MOVED_BYTES`, in place."""
    one, other = (torch.ones(MOVED_BYTES // 4, device=device) for _ in range(2))
    return _seconds(device, lambda: one.add_(other), go_on, times=7)


def copy_s(device: torch.device, go_on: GoOn = bool) -> float:
    """Seconds to copy a tensor of `MOVED_BYTES` into another."""
    one, other = (torch.ones(MOVED_BYTES // 4, device=device) for _ in range(2))
    return _seconds(device, lambda: one.copy_(other), go_on, times=7)


def _seconds(device: torch.device, call: Callable[[], object], go_on: GoOn, times: int) -> float:
    """The median of several calls; the first two warm up."""
    found = []
    for _ in range(times):
        go_on(True)
        begin_s = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin_s)
    return median(found[2:])
