"""What a process that trains holds, measured: of one worker alone, and by how much it grows with a further model."""

from __future__ import annotations

import dataclasses
import gc

import torch

from paceline.job import Job
from paceline.measure.machine import (
    file_memory_bytes,
    forget_peak_memory,
    held_memory_bytes,
    peak_memory_bytes,
)
from paceline.train.allocator import give_back_freed_memory
from paceline.train.data import ShareLoader
from paceline.train.replica import Replica
from paceline.train.session import Datasets

_STEPS = 2
"""The first makes the optimizer's state; the second has it beside its activations."""
_FEWER = 4
"""Micro-batches of the smaller size, or the next number that divides the batch."""


class Growth:
    """By how much the memory of this process grows from now on, at most."""

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        give_back_freed_memory()
        self._before_bytes = held_memory_bytes(self._kind)
        self._is_known = forget_peak_memory(self._kind)

    def most_bytes(self) -> int | None:
        """None where the system does not tell."""
        return peak_memory_bytes(self._kind) - self._before_bytes if self._is_known else None


@dataclasses.dataclass(frozen=True)
class HeldMemory:
    """Bytes that one process, which trains alone, holds."""

    peak: int
    """At most, with whole batches."""
    peak_in_parts: int
    """At most, with `micro` micro-batches."""
    micro: int
    empty: int
    """Without a model, after there was one."""
    files: int
    """Pages of files among that."""


def measure_held_memory(
    job: Job, datasets: Datasets, *, seed: int, device: torch.device, precision: str
) -> HeldMemory:
    """A few steps in this process, which has not trained anything yet."""
    micro = next(m for m in range(min(_FEWER, job.batch_size), 0, -1) if job.batch_size % m == 0)
    replica = Replica(job, seed=seed, device=device, precision=precision, total_steps=job.steps or 1000)
    found = {}
    for parts in (1, micro):
        give_back_freed_memory()
        forget_peak_memory(device.type)
        loader = ShareLoader(
            job, datasets["train"], seed=seed, micro=parts, size=1, rank=0, device=device
        ).endless()
        for _ in range(_STEPS):
            replica.step(next(loader))
        found[parts] = peak_memory_bytes(device.type)
    files = file_memory_bytes(device.type)
    del replica, loader
    gc.collect()  # models and their hooks refer to each other
    give_back_freed_memory()
    return HeldMemory(
        peak=found[1],
        peak_in_parts=found[micro],
        micro=micro,
        empty=held_memory_bytes(device.type),
        files=files,
    )
