"""Measuring all hosts of a launch without a job: devices, exchanges between their workers, and both at once."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterator
from statistics import mean, median

import torch

from paceline.comm.group import Group
from paceline.comm.threads import take_cores
from paceline.comm.world import AUTO, World
from paceline.measure.machine import versions
from paceline.plan.fits import fit
from paceline.plan.hardware import DeviceSpeed, Exchanges, Hardware, Overlap
from paceline.plan.links import KINDS
from paceline.records import Cluster
from paceline.train.conditions import conditions_of
from paceline.train.device_speeds import MOVED_BYTES, addition_s, copy_s, product_flops_per_s
from paceline.train.link_speeds import ALL_SIZES, agreed, finish, first_workers, measure_collective

BUDGET_S = 15.0
"""What measuring exchanges takes, about."""
_TURNS = 6
"""Each size of each collective is repeated about so many times as long as one turn takes: the first ones warm up."""
_OVERLAPPED_BYTES = (1 << 20, 16 << 20)
_ROUNDS_S = 1.0
_FEWEST, _MOST = 5, 25
"""Rounds of the three that are compared."""
_LONGEST_S = 1.0
"""All-reduces that take longer are not overlapped with anything."""
_SIDE = 384
"""Of the matrices that are multiplied meanwhile: one product takes a few milliseconds at most."""


def survey(world: World, everyone: Group, cluster: Cluster, budget_s: float = BUDGET_S) -> Hardware | None:
    """What was measured, on rank 0; None on the others. A collective call of all workers.

    Exchanges are those of 2, 4, 8, … and all workers of the first host, each way that their tensors may take; and with
    several hosts those of each one's first worker, and of all workers of all hosts.

    Args:
        budget_s: about how long the exchanges may take.
    """
    devices = _devices(world, everyone, cluster)
    take_cores(world.local_rank, world.local_size)
    groups = list(_groups(world, cluster))
    calls_s = budget_s / max(1, len(groups)) / len(KINDS) / len(ALL_SIZES) / _TURNS
    found = []
    for place, ranks, make in groups:
        group = make()
        everyone.barrier("before a group is measured")
        if group is not None and group.size > 1:
            found.append(_exchanges(group, place, calls_s))
        everyone.barrier(f"after the exchanges of {len(ranks)}")
    if world.rank != 0:
        return None
    return Hardware(cluster=cluster, devices=devices, exchanges=tuple(found), versions=versions())


def _devices(world: World, everyone: Group, cluster: Cluster) -> tuple[tuple[DeviceSpeed, ...], ...]:
    """Of each host, under its conditions one after the other: all hosts at once."""
    firsts = [*first_workers(cluster), world.size]
    spans = [tuple(range(begin, end)) for begin, end in itertools.pairwise(firsts)]
    mine = next(at for at, ranks in enumerate(spans) if world.rank in ranks)
    conditions = [list(conditions_of(host)) for host in cluster.hosts]
    found: list[list[DeviceSpeed]] = [[] for _ in spans]
    for number in range(max(map(len, conditions))):
        everyone.barrier("before measuring devices")
        own: list[float] | None = None
        if number < len(conditions[mine]) and world.local_rank < conditions[mine][number][1]:
            threads, active = conditions[mine][number]
            take_cores(world.local_rank, active, threads)
            own = [
                product_flops_per_s(world.device),
                3 * MOVED_BYTES / addition_s(world.device),
                2 * MOVED_BYTES / copy_s(world.device),
            ]
        rows = everyone.gather_json(own, "the devices' speeds")
        for at, ranks in enumerate(spans):
            told = [rows[rank] for rank in ranks if rows[rank] is not None]
            if told:
                threads, active = conditions[at][number]
                products, additions, copies = (mean(column) for column in zip(*told, strict=True))
                found[at].append(
                    DeviceSpeed(
                        threads=threads,
                        active=active,
                        product_flops_per_s=products,
                        add_bytes_per_s=additions,
                        copy_bytes_per_s=copies,
                    )
                )
    return tuple(map(tuple, found))


def _groups(
    world: World, cluster: Cluster
) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Group | None]]]:
    """Where each group is, its ranks, and how to make it: a collective call."""
    over_gloo = dataclasses.replace(world, transport="gloo", groups={}, in_use=set())
    here = cluster.hosts[0].workers
    has_ways = world.transport == AUTO and world.device.type == "cpu"
    for number in _numbers(here):
        ranks = tuple(range(number))
        yield "one host", ranks, functools.partial(world.group_of, ranks, busy=number, mailbox=True)
        if has_ways:
            yield "one host", ranks, functools.partial(over_gloo.group_of, ranks, busy=number)
    if len(cluster.hosts) > 1:
        firsts = first_workers(cluster)
        yield "one of each host", firsts, functools.partial(world.group_of, firsts, busy=len(firsts))
        if world.size > len(firsts):
            ranks = tuple(range(world.size))
            yield "all hosts", ranks, functools.partial(world.group_of, ranks, busy=world.size)


def _numbers(workers: int) -> list[int]:
    """2, 4, 8, … and all."""
    doubled = [2**power for power in range(1, workers.bit_length())]
    return sorted({*(number for number in doubled if number <= workers), *([workers] if workers > 1 else [])})


def _exchanges(group: Group, place: str, calls_s: float) -> Exchanges:
    measured = tuple(measure_collective(group, kind, ALL_SIZES, calls_s) for kind in KINDS)
    sums = measured[KINDS.index("all-reduce")].seconds
    overlapped = [size for size in _OVERLAPPED_BYTES if sums(size) <= _LONGEST_S]
    return Exchanges(
        place=place,
        workers=group.size,
        transport=group.transport,
        measured=measured,
        fits={one.kind: fit(one.seconds.points) for one in measured},
        overlaps=tuple(_overlap(group, num_bytes) for num_bytes in overlapped),
    )


def _overlap(group: Group, num_bytes: int) -> Overlap:
    """Products that take at least as long as the all-reduce, the all-reduce, and both: the median of rounds of each."""
    matrix = torch.rand(_SIDE, _SIDE, device=group.device)
    product = torch.empty_like(matrix)
    tensor = torch.zeros(num_bytes // 4, device=group.device)

    def exchange() -> None:
        group.sum_(tensor, "a measured sum")

    def compute(count: int) -> None:
        for _ in range(count):
            torch.mm(matrix, matrix, out=product)

    def both(count: int) -> None:
        pending = group.start_sum(tensor, "a measured sum")
        compute(count)
        pending.wait()

    def seconds(call: Callable[[], object]) -> float:
        group.barrier("before a turn")
        begin_s = time.perf_counter()
        call()
        group.barrier("after a turn")
        finish(group.device)
        return time.perf_counter() - begin_s

    few = functools.partial(compute, 4)
    for call in (few, exchange):
        seconds(call)
    product_s = agreed(group, median(seconds(few) for _ in range(3)) / 4)
    exchange_s = agreed(group, median(seconds(exchange) for _ in range(3)))
    count = max(1, math.ceil(exchange_s / product_s))
    calls = functools.partial(compute, count), exchange, functools.partial(both, count)
    times = int(min(_MOST, max(_FEWEST, _ROUNDS_S / (3 * exchange_s))))
    rounds = [[seconds(call) for call in calls] for _ in range(times)]
    computing_s, exchanging_s, both_s = (
        agreed(group, median(column)) for column in zip(*rounds, strict=True)
    )
    return Overlap(num_bytes=num_bytes, computing_s=computing_s, exchanging_s=exchanging_s, both_s=both_s)
