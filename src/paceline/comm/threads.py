"""Sharing out a host's cores among its workers: threads and affinity."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

import torch

from paceline.comm.world import share_of_cores
from paceline.measure.machine import usable_cores


def threads_for(local_workers: int, threads: int | None = None) -> int:
    """Threads of one of `local_workers` workers on this host.

    An explicit `threads` wins over `OMP_NUM_THREADS`, and that over an equal share of the cores.
    """
    if threads is not None:
        return threads
    from_environment = user_threads()
    if from_environment is not None:
        return from_environment
    return max(1, len(usable_cores()) // local_workers)


def user_threads() -> int | None:
    """`OMP_NUM_THREADS`, where the user has set it to a number."""
    text = os.environ.get("OMP_NUM_THREADS", "").split(",")[0]
    return int(text) if text.isdecimal() and int(text) > 0 else None


def take_cores(
    local_rank: int, local_workers: int, threads: int | None = None
) -> tuple[tuple[int, ...], int]:
    """Give this process its share of the cores and its number of threads; returns both.

    Where the shares are whole cores, the process is bound to its own, so that workers do not
    push each other around. More threads than cores in the share leave the process unbound.
    """
    count = threads_for(local_workers, threads)
    torch.set_num_threads(count)
    everything = usable_cores()
    cores = share_of_cores(everything, local_rank, local_workers)
    if count > len(cores) or local_workers > len(everything):
        cores = everything
    _bind_all_threads(cores)
    return cores, count


def _bind_all_threads(cores: Sequence[int]) -> None:
    """Bind every thread of this process: those of the arithmetic pools were started by others' settings."""
    if not hasattr(os, "sched_setaffinity"):
        return
    try:
        ids = [int(name) for name in os.listdir("/proc/self/task")]
    except OSError:
        ids = [0]
    for thread in ids:
        # A thread may end between the listing and the call.
        with contextlib.suppress(OSError):
            os.sched_setaffinity(thread, cores)
