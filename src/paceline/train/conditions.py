"""The conditions under which costs are measured: threads of each worker, and workers at a time."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence

import torch

from paceline.comm.group import Group
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.plan.profile import MOST_SPREAD
from paceline.records import Host
from paceline.train.profiling import Measured

_ATTEMPTS = 2
"""Measurements of one condition, where the first is too noisy to plan with: the less noisy one counts."""


def under_conditions(
    conditions: Sequence[tuple[int, int]],
    world: World,
    everyone: Group,
    measure: Callable[[Group, int], Measured],
) -> list[Measured]:
    """What this worker has measured under each condition that it takes part in. A collective call of all workers.

    Args:
        measure: given the workers that measure at the same time, and the threads of each.
    """
    found = []
    for count, active in conditions:
        group = world.group(active)
        attempts: list[Measured] = []
        for _ in range(_ATTEMPTS):
            gc.collect()  # models and their hooks refer to each other
            everyone.barrier("before measuring")
            if group is not None:
                take_cores(world.local_rank, active, count)
                attempts.append(measure(group, count))
            spreads = everyone.gather_json([one.spread for one in attempts], "how noisy it was")[0]
            if spreads[-1] <= MOST_SPREAD:
                break
        if attempts:
            found.append(attempts[spreads.index(min(spreads))])
        everyone.barrier("after measuring")
    return found


def as_rank_0(group: Group, wish: bool) -> bool:
    """Whether the group's rank 0 goes on; told when all have come."""
    own = torch.tensor([float(wish and group.rank == 0)], device=group.device)
    return bool(group.sum_(own, "a measured pass") > 0)


def conditions_of(host: Host, threads: int | None = None) -> Iterator[tuple[int, int]]:
    """Threads of each worker and workers at a time, under which a host is measured."""
    on_cpu = host.device == "cpu"
    yield threads or 1, 1
    if on_cpu and host.cores > 1 and threads is None:
        yield host.cores, 1
    if host.workers > 1:
        shared = max(1, host.cores // host.workers) if on_cpu else 1
        yield threads or shared, host.workers
