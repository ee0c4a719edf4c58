"""Does the job gain from bfloat16 on this device? Timed on its own steps.

A matrix product in wall-clock time once chose bf16 on a CPU without the hardware for it (docs/log.md).
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.errors import RunError
from paceline.job import Job
from paceline.train.data import GlobalBatch, ShareLoader
from paceline.train.device_clock import done_s
from paceline.train.replica import Replica
from paceline.train.session import Datasets

PRECISIONS = ("auto", "fp32", "bf16")

LEAST_GAIN = 1.1
"""A step in bf16 must be this many times as fast, or training stays in fp32."""

_SHARE = 8
"""Timed on one eighth of a global batch, so that a device for which bf16 is very slow loses little time."""
_ROUNDS = 5


def check_precision(wanted: str) -> None:
    """Raise `RunError` unless `wanted` is one of `PRECISIONS`."""
    if wanted not in PRECISIONS:
        raise RunError(f"--precision is {wanted!r}", next_step=f"use one of {', '.join(PRECISIONS)}")


def choose_precision(
    wanted: str, job: Job, datasets: Datasets, *, seed: int, device: torch.device
) -> tuple[str, str]:
    """`fp32` or `bf16` (autocast; parameters stay float32), and the reason in words.

    `auto` times interleaved steps of the job in both, on this worker alone.
    """
    if wanted != "auto":
        return wanted, "as asked for"
    fp32_s, bf16_s = _time_steps(job, datasets, seed, device)
    ratio = min(fp32_s) / min(bf16_s)
    taken = "bf16" if ratio >= LEAST_GAIN else "fp32"
    return taken, f"a step of this job in bf16 has {ratio:.2g}× the speed of one in fp32 on this device"


def _time_steps(
    job: Job, datasets: Datasets, seed: int, device: torch.device
) -> tuple[Sequence[float], Sequence[float]]:
    """Seconds of steps in fp32 and in bf16, in turn; fewer where bf16 is far behind.

    On a CPU: processor time of one thread. Wall-clock time of several threads on cores that others use
    as well says nothing: products in fp32, spread over threads, then look slower than those in bf16, which
    are not.
    """
    if device.type == "cpu":
        torch.set_num_threads(1)
    small = dataclasses.replace(job, batch_size=max(2, job.batch_size // _SHARE), loader_workers=0)
    batches = ShareLoader(small, datasets["train"], seed=seed, micro=1, size=1, rank=0, device=device).epoch(
        0
    )
    batch = next(batches)
    replica = Replica(job, seed=seed, device=device, precision="fp32", total_steps=1000)
    replica.attach(data_mesh(Group.alone(device)))
    times_s: dict[str, list[float]] = {"fp32": [], "bf16": []}
    for _ in range(_ROUNDS + 1):  # the first round warms up
        for precision, found in times_s.items():
            replica.precision = precision
            found.append(_step_s(replica, batch, device))
        fp32_s, bf16_s = times_s.values()
        if len(fp32_s) > 1 and bf16_s[-1] > 3 * fp32_s[-1]:
            break
    return fp32_s[1:], bf16_s[1:]


def _step_s(replica: Replica, batch: GlobalBatch, device: torch.device) -> float:
    if device.type == "cpu":
        begin_s = time.process_time()
        replica.step(batch)
        return time.process_time() - begin_s
    begin_s = done_s(device)
    replica.step(batch)
    return done_s(device) - begin_s
