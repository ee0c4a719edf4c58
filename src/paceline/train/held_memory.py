"""What a process that trains holds, measured: of one worker alone, and by how much it grows with a further model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.measure.machine import (
    file_memory_bytes,
    forget_peak_memory,
    held_memory_bytes,
    peak_memory_bytes,
)
from paceline.records import Layout
from paceline.train.allocator import give_back_freed_memory
from paceline.train.data import ShareLoader, few_samples
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
    peak_recomputed: int | None
    """At most, with whole batches, where all is computed again in the backward pass; None: the job cannot do that."""
    empty: int
    """Without a model, after there was one."""
    files: int
    """Pages of files among that."""
    splitting: int
    """What the code that splits models adds to it."""


def measure_held_memory(
    job: Job, datasets: Datasets, *, seed: int, device: torch.device, precision: str
) -> HeldMemory:
    """A few steps in this process, which has not trained anything yet."""
    kind, micro = device.type, next(m for m in range(_FEWER, 0, -1) if job.batch_size % m == 0)

    def peak(layout: Layout, numbers: tuple[int, ...]) -> list[int]:
        """With each of these numbers of micro-batches."""
        mesh = data_mesh(Group.alone(device), layout)
        replica = Replica(
            job,
            seed=seed,
            device=device,
            precision=precision,
            total_steps=job.steps or 1000,
            in_parts=layout.splits_model,
            images=datasets.images,
        )
        if layout.splits_model:
            replica.split(mesh, few_samples(job, datasets["train"], device))
        found = []
        for number in numbers:
            give_back_freed_memory()
            forget_peak_memory(kind)
            loader = ShareLoader(
                job, datasets["train"], seed=seed, micro=number, size=1, rank=0, device=device
            )
            for batch in itertools.islice(loader.endless(), _STEPS):
                replica.step(batch)
            found.append(peak_memory_bytes(kind))
        return found

    def held() -> int:
        gc.collect()  # models and their hooks refer to each other
        give_back_freed_memory()
        return held_memory_bytes(kind)

    whole, in_parts = peak(Layout(), (1, micro))
    empty, files = held(), file_memory_bytes(kind)
    recomputed = None
    with contextlib.suppress(LayoutError):
        (recomputed,) = peak(Layout(recompute="full"), (1,))
    return HeldMemory(
        peak=whole,
        peak_in_parts=in_parts,
        micro=micro,
        peak_recomputed=recomputed,
        empty=empty,
        files=files,
        splitting=max(0, held() - empty),
    )
