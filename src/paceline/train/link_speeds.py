"""How long exchanges between workers take: measured within a host, and between hosts."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.plan.curves import Curve
from paceline.plan.links import Link, MeasuredCollective
from paceline.records import Cluster

_SIZES = (4, 64 << 10, 1 << 20, 16 << 20)
"""Bytes of what is exchanged."""
_CALLS_S = 0.05
"""About how long one size of one collective is repeated in a turn."""
_TURNS = 5
_LONGEST_S = 0.5
"""Sizes that would take longer are left out: a slow link is as good as a straight line by then."""


def measure_links(world: World, everyone: Group, cluster: Cluster) -> tuple[Link, Link | None, float]:
    """Within the first host, between the hosts' first workers; and how long a meeting takes within a host."""
    none = Link(name="none", latency_s=0.0, bytes_per_s=1e12)
    within, between, meeting_s = none, None, 0.0
    firsts = tuple(sum(h.workers for h in cluster.hosts[:number]) for number in range(len(cluster.hosts)))
    here = tuple(range(cluster.hosts[0].workers))
    if len(here) > 1:
        group = world.group_of(here, busy=len(here), mailbox=True)
        if group is not None:
            within = _measure_link(group, is_shared=group.device.type == "cpu")
            meeting_s = _seconds(group, functools.partial(group.barrier, "a measured meeting"))
        everyone.barrier("after the link within a host")
    if len(firsts) > 1:
        group = world.group_of(firsts, busy=len(firsts))
        # Each host has a cable of its own.
        between = none if group is None else _measure_link(group, is_shared=False)
        everyone.barrier("after the link between hosts")
    return within, between, meeting_s


def _measure_link(group: Group, *, is_shared: bool) -> Link:
    found = []
    for kind in ("all-reduce", "all-gather", "reduce-scatter", "message"):
        seconds: dict[float, float] = {}
        for num_bytes in _SIZES:
            if len(seconds) > 1 and _expected(seconds, num_bytes) > _LONGEST_S:
                break
            numel = -(-num_bytes // 4 // group.size) * group.size
            tensor = torch.ones(numel, device=group.device)
            seconds[float(4 * numel)] = _seconds(group, _call(group, kind, tensor))
        found.append(MeasuredCollective(kind=kind, workers=group.size, seconds=Curve.of(seconds)))
    (_, least_s), *_, (most_bytes, most_s) = found[-1].seconds.points
    return Link(
        name=group.transport,
        latency_s=least_s,
        bytes_per_s=most_bytes / max(most_s - least_s, 1e-9),
        is_shared=is_shared,
        measured=tuple(found),
    )


def _expected(seconds: dict[float, float], num_bytes: int) -> float:
    """Of a larger size, in proportion to the last one."""
    last_bytes, last_s = max(seconds.items())
    return last_s * num_bytes / last_bytes


def _call(group: Group, kind: str, tensor: torch.Tensor) -> Callable[[], object]:
    def message() -> None:
        """From the first worker to the second; the others wait for none."""
        if group.rank == 0:
            group.start_send(tensor, 1, "a measured message").wait()
        elif group.rank == 1:
            group.receive_(tensor, 0, "a measured message")

    return {
        "all-reduce": lambda: group.sum_(tensor, "a measured sum"),
        "all-gather": lambda: group.all_gather_(tensor, "a measured gathering"),
        "reduce-scatter": lambda: group.reduce_scatter_(tensor, "a measured scattering"),
        "message": message,
    }[kind]


def _seconds(group: Group, call: Callable[[], object]) -> float:
    """Of one call, all workers at once: the median of several turns of several calls, as rank 0 has measured it."""

    def turn(count: int) -> float:
        group.barrier("before a turn")
        begin_s = time.perf_counter()
        for _ in range(count):
            call()
        # A message has arrived when its receiver says so.
        group.barrier("after a turn")
        return (time.perf_counter() - begin_s) / count

    turn(1)
    first_s = max(_agreed(group, turn(2)), 1e-6)
    count = int(max(1.0, min(200.0, _CALLS_S / first_s)))
    # What takes long is repeated less often: little of it is noise.
    turns = int(max(1.0, min(_TURNS, _TURNS * _CALLS_S / first_s)))
    return _agreed(group, median(turn(count) for _ in range(turns)))


def _agreed(group: Group, seconds: float) -> float:
    """Rank 0's, on all workers."""
    told = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    return float(group.broadcast_(told, "what was measured"))
