"""Does this device gain from bfloat16? Measured, because some lack the hardware and are far slower."""

from __future__ import annotations

import time

import torch

from paceline.errors import RunError

LEAST_GAIN = 1.3
"""A matrix product in bf16 must be this many times faster, for the casts around it to be earned back."""

PRECISIONS = ("auto", "fp32", "bf16")


def choose_precision(wanted: str, device: torch.device) -> tuple[str, str]:
    """`fp32` or `bf16` (autocast, parameters stay float32), and the reason in words.

    Raises:
        RunError: `wanted` is none of `auto`, `fp32`, `bf16`.
    """
    if wanted not in PRECISIONS:
        raise RunError(f"precision is {wanted!r}", next_step=f"use one of {', '.join(PRECISIONS)}")
    if wanted != "auto":
        return wanted, "as asked for"
    ratio = _matmul_s(torch.float32, device) / _matmul_s(torch.bfloat16, device)
    if ratio >= LEAST_GAIN:
        return "bf16", f"matrix products in bf16 are {ratio:.1f}× as fast as in fp32 on this device"
    return "fp32", f"matrix products in bf16 have {ratio:.2g}× the speed of fp32 on this device"


def _matmul_s(dtype: torch.dtype, device: torch.device) -> float:
    """Least seconds of a matrix product; small on a CPU, where one without bf16 hardware takes long."""
    size = 192 if device.type == "cpu" else 4096
    a = torch.ones(size, size, dtype=dtype, device=device)
    times_s = []
    for _ in range(4):
        begin_s = time.perf_counter()
        torch.mm(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times_s.append(time.perf_counter() - begin_s)
    return min(times_s)
