"""What a process that trains holds, measured: of one worker alone, and by how much it grows with a further model."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import itertools
from collections.abc import Mapping

import torch
from torch import nn

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
from paceline.records import RECOMPUTE, Layout
from paceline.split.deferred import build_deferred
from paceline.train.allocator import give_back_freed_memory, heap_without_holes
from paceline.train.data import ShareLoader, few_samples, first_samples, num_samples
from paceline.train.device_clock import done_s
from paceline.train.replica import Replica
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure

FEWEST_STEPS, MOST_STEPS, ENOUGH_S = 3, 8, 1.0
"""The first makes the optimizer's state; the second has it beside its activations. Some more, where they are short,
find gaps in the heap that nothing fits into; then a process holds about what it will."""
_FEWER = 4
"""Micro-batches of the smaller size, or the next number that divides the batch."""


EVALUATED_BATCHES, MOST_EVALUATED_BATCHES = 4, 16
"""Of an evaluation: samples may be of several sizes. Up to so many if they are short: as `MOST_STEPS`."""


class Growth:
    """By how much the memory of this process grows from now on, at most."""

    def __init__(self, device: torch.device) -> None:
        self._kind = device.type
        give_back_freed_memory()
        self._before_bytes = held_memory_bytes(self._kind)
        self._is_known = forget_peak_memory(self._kind)

    def begin_anew(self) -> None:
        """What was held until now does not count any more."""
        give_back_freed_memory()
        forget_peak_memory(self._kind)

    def most_bytes(self) -> int | None:
        """None where the system does not tell."""
        return peak_memory_bytes(self._kind) - self._before_bytes if self._is_known else None


@dataclasses.dataclass(frozen=True)
class Recomputed:
    """Steps in which something is computed again."""

    peak: int
    """Bytes held at most, with whole batches."""
    step_s: tuple[float, float]
    """As `HeldMemory.step_s`."""


@dataclasses.dataclass(frozen=True)
class HeldMemory:
    """Bytes that one process, which trains alone, holds; without what splits models, where nothing is split."""

    peak: int
    """At most, with whole batches."""
    peak_in_parts: int
    """At most, with `micro` micro-batches."""
    micro: int
    recomputed: Mapping[str, Recomputed]
    """By what is computed again in the backward pass; what the job cannot do is left out."""
    step_s: tuple[float, float]
    """Seconds of a step with whole batches, and of one with `micro` micro-batches, where nothing is computed again."""
    evaluation: int
    """At most in an evaluation, with whole batches of `evaluation_samples`."""
    evaluation_samples: int
    evaluation_in_parts: int
    """At most in an evaluation of `fewer_samples`."""
    fewer_samples: int
    empty: int
    """Without a model, after there was one."""
    files: int
    """Pages of files among that."""
    splitting: int
    """What the code that splits models adds to it, or computes again."""


def load_splitting(device: torch.device) -> int:
    """Have what splits models, and looks through them, in memory; by how many bytes a worker on CPUs grows for it.

    torch imports tens of MiB when it first computes without memory. A process that trains a whole model does not.
    """
    give_back_freed_memory()
    before = held_memory_bytes("cpu")
    build_deferred(lambda: nn.Linear(4, 4), torch.device("cpu"), None, least_bytes=0)
    torch.ones(1, device="meta").add(1)
    give_back_freed_memory()
    return max(0, held_memory_bytes("cpu") - before) if device.type == "cpu" else 0


def measure_held_memory(
    job: Job,
    datasets: Datasets,
    *,
    seed: int,
    device: torch.device,
    precision: str,
    splitting: int = 0,
) -> HeldMemory:
    """A few steps, and evaluations of a few batches, in this process, which has not trained anything yet.

    Args:
        splitting: bytes that `load_splitting` has told.
    """
    kind, batch_size = device.type, job.batch_size
    # Of one sample alone batch norm has no statistics.
    micro = next(m for m in range(_FEWER, 0, -1) if m == 1 or (batch_size % m == 0 and m < batch_size))

    together = job.evaluation_batch_size or job.batch_size
    length = num_samples(datasets["test"], "test")
    together = together if length is None else min(together, length)
    fewer = max(1, together // _FEWER)

    def peak(layout: Layout, *, evaluates: bool = False) -> tuple[list[int], tuple[float, float]]:
        """With whole batches, with micro-batches, then in an evaluation of a few samples and one of a few batches; and
        seconds of the first two's last steps."""
        mesh = data_mesh(Group.alone(device), layout)
        replica = replica_to_measure(
            job, datasets, seed=seed, device=device, precision=precision, in_parts=layout.splits_model
        )
        if layout.splits_model:
            replica.split(mesh, few_samples(job, datasets["train"], device))
        found, step_s = [], []
        for number in (1, micro):
            give_back_freed_memory()
            forget_peak_memory(kind)
            loader = ShareLoader(
                job, datasets["train"], seed=seed, micro=number, size=1, rank=0, device=device
            )
            first_s = done_s(device)
            for count, batch in enumerate(itertools.islice(loader.endless(), MOST_STEPS), start=1):
                begin_s = done_s(device)
                replica.step(batch)
                end_s = done_s(device)
                if count >= FEWEST_STEPS and end_s - first_s > ENOUGH_S:
                    break
            found.append(peak_memory_bytes(kind))
            step_s.append(end_s - begin_s)
        if evaluates:
            evaluate_s = evaluate(replica, fewer)
            found.append(peak_memory_bytes(kind))
            batches = int(ENOUGH_S * fewer / (evaluate_s * together))
            evaluate(replica, together * min(max(EVALUATED_BATCHES, batches), MOST_EVALUATED_BATCHES))
            found.append(peak_memory_bytes(kind))
        return found, (step_s[0], step_s[1])

    def evaluate(replica: Replica, samples: int) -> float:
        """Seconds of it; what it has held at most can be read afterwards."""
        give_back_freed_memory()
        forget_peak_memory(kind)
        begin_s = done_s(device)
        replica.evaluate(first_samples(datasets["test"], "test", samples))
        return done_s(device) - begin_s

    def held() -> int:
        gc.collect()  # models and their hooks refer to each other
        give_back_freed_memory()
        return held_memory_bytes(kind)

    (whole, in_parts, *evaluation), step_s = peak(Layout(), evaluates=True)
    empty, files = held(), file_memory_bytes(kind)
    recomputed = {}
    for how in RECOMPUTE[1:]:
        with contextlib.suppress(LayoutError), heap_without_holes():
            (most, _), took_s = peak(Layout().model_copy(update={"recompute": how}))
            recomputed[how] = Recomputed(most, took_s)
    more = max(0, held() - empty)
    whole, in_parts, fewer_evaluated, evaluated, empty = (
        n - splitting for n in (whole, in_parts, *evaluation, empty)
    )
    return HeldMemory(
        peak=whole,
        peak_in_parts=in_parts,
        micro=micro,
        recomputed=recomputed,
        step_s=step_s,
        evaluation=evaluated,
        evaluation_samples=together,
        evaluation_in_parts=fewer_evaluated,
        fewer_samples=fewer,
        empty=empty,
        files=files,
        splitting=splitting + more,
    )
