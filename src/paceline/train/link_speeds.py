"""How long workers take to exchange something, measured: for the planner, and for `paceline measure`."""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.plan.curves import Curve
from paceline.plan.links import KINDS, STREAM, Link, MeasuredCollective
from paceline.records import Cluster

ALL_SIZES = tuple(4 << 2 * power for power in range(12))
"""4 bytes to 16 MiB."""
_PLANNED_SIZES = (4, 64 << 10, 1 << 20, 16 << 20)
_PLANNED_KINDS = ("all-reduce", "all-gather", "reduce-scatter", STREAM, "message")
"""What forecasts of layouts are made of."""
_DIVIDED = ("all-gather", "reduce-scatter", "all-to-all")
"""Each worker has an equal part of the tensor."""
_CALLS_S = 0.05
"""About how long one size of one collective is repeated in a turn."""
_TURNS = 5
_LONGEST_S, _LONGEST_SMALL_S = 0.5, 2.0
"""Sizes that would take longer are left out: a slow link is as good as a straight line by then. Small ones tell less
of that: a host with a quota pauses for as long as a large message takes."""
_SMALL_BYTES = 1 << 20


def first_workers(cluster: Cluster) -> tuple[int, ...]:
    """The rank of each host's first worker."""
    return tuple(sum(h.workers for h in cluster.hosts[:number]) for number in range(len(cluster.hosts)))


def measure_links(world: World, everyone: Group, cluster: Cluster) -> tuple[Link, Link | None, float]:
    """Within the first host, between the hosts' first workers; and how long a meeting takes within a host."""
    none = Link(name="none", latency_s=0.0, bytes_per_s=1e12)
    within, between, meeting_s = none, None, 0.0
    firsts = first_workers(cluster)
    here = tuple(range(cluster.hosts[0].workers))
    if len(here) > 1:
        with world.group_for_a_while(here, busy=len(here), mailbox=True) as group:
            if group is not None:
                within = _measure_link(group, is_shared=group.device.type == "cpu")
                meeting_s = _seconds(group, functools.partial(group.barrier, "a measured meeting"), _CALLS_S)
        everyone.barrier("after the link within a host")
    if len(firsts) > 1:
        with world.group_for_a_while(firsts, busy=len(firsts), mailbox=True) as group:
            # Each host has a cable of its own.
            between = none if group is None else _measure_link(group, is_shared=False)
        everyone.barrier("after the link between hosts")
    return within, between, meeting_s


def _measure_link(group: Group, *, is_shared: bool) -> Link:
    found = [measure_collective(group, kind, _PLANNED_SIZES) for kind in _PLANNED_KINDS]
    (_, least_s), *_, (most_bytes, most_s) = found[-1].seconds.points
    return Link(
        name=group.transport,
        latency_s=least_s,
        bytes_per_s=most_bytes / max(most_s - least_s, 1e-9),
        is_shared=is_shared,
        measured=tuple(found),
    )


def measure_collective(
    group: Group, kind: str, sizes: Sequence[int], calls_s: float = _CALLS_S
) -> MeasuredCollective:
    """Seconds of one kind against bytes. A collective call of the group.

    Args:
        kind: one of `KINDS`, or `STREAM`. Messages go there and back, one after the other; of a stream all go one way.
        sizes: bytes, ascending; rounded up to what can be divided among the workers, where it is.
        calls_s: about how long a size is repeated in each of five turns.
    """
    assert kind in (*KINDS, STREAM)
    seconds: dict[float, float] = {}
    parts = group.size if kind in _DIVIDED else 1
    for num_bytes in sizes:
        if len(seconds) > 1 and _takes_too_long(seconds, num_bytes):
            break
        numel = -(-num_bytes // 4 // parts) * parts
        tensor = torch.ones(numel, device=group.device)
        if kind == "message":
            taken_s = _seconds(group, _there_and_back(group, tensor), calls_s) / 2
        else:
            taken_s = _seconds(group, _call(group, kind, tensor), calls_s)
        seconds[float(4 * numel)] = taken_s
    return MeasuredCollective(kind=kind, workers=group.size, seconds=Curve.of(seconds))


def _takes_too_long(seconds: dict[float, float], num_bytes: int) -> bool:
    """A larger size, if what the last one took beyond the smallest grows with its bytes."""
    (_, least_s), (last_bytes, last_s) = min(seconds.items()), max(seconds.items())
    expected_s = least_s + (last_s - least_s) * num_bytes / last_bytes
    return expected_s > (_LONGEST_SMALL_S if last_bytes < _SMALL_BYTES else _LONGEST_S)


def _call(group: Group, kind: str, tensor: torch.Tensor) -> Callable[[], object]:
    def next_message() -> None:
        """From the first worker to the second; the others wait for none."""
        if group.rank == 0:
            group.start_send(tensor, 1, "a measured message").wait()
        elif group.rank == 1:
            group.receive_(tensor, 0, "a measured message")

    source = itertools.cycle(range(group.size))
    received = torch.empty_like(tensor) if kind == "all-to-all" else tensor
    return {
        "all-reduce": lambda: group.sum_(tensor, "a measured sum"),
        "all-gather": lambda: group.all_gather_(tensor, "a measured gathering"),
        "reduce-scatter": lambda: group.reduce_scatter_(tensor, "a measured scattering"),
        "all-to-all": lambda: group.all_to_all_(received, tensor, "a measured exchange"),
        # From each in turn: nobody begins the next before it has what came before.
        "broadcast": lambda: group.broadcast_(tensor, "a measured broadcast", next(source)),
        STREAM: next_message,
    }[kind]


def _there_and_back(group: Group, tensor: torch.Tensor) -> Callable[[], object]:
    """Between the first two workers; the others wait for none."""

    def send() -> None:
        group.start_send(tensor, 1 - group.rank, "a measured message").wait()

    def receive() -> None:
        group.receive_(tensor, 1 - group.rank, "a measured message")

    def call() -> None:
        for turn in (send, receive) if group.rank == 0 else (receive, send):
            turn()

    return call if group.rank < 2 else lambda: None


def _seconds(group: Group, call: Callable[[], object], calls_s: float) -> float:
    """Of one call, all workers at once: the median of several turns of several calls, as rank 0 has measured it."""

    def turn(count: int) -> float:
        group.barrier("before a turn")
        begin_s = time.perf_counter()
        for _ in range(count):
            call()
        # A message has arrived when its receiver says so.
        group.barrier("after a turn")
        finish(group.device)
        return (time.perf_counter() - begin_s) / count

    only_s = agreed(group, turn(1))
    if only_s > _LONGEST_S:
        return only_s
    first_s = max(agreed(group, turn(2)), 1e-6)
    count = int(max(1.0, min(200.0, calls_s / first_s)))
    # What takes long is repeated less often: little of it is noise.
    turns = int(max(1.0, min(_TURNS, _TURNS * calls_s / first_s)))
    return agreed(group, median(turn(count) for _ in range(turns)))


def finish(device: torch.device) -> None:
    """Return when the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def agreed(group: Group, seconds: float) -> float:
    """Rank 0's, on all workers."""
    told = torch.tensor([seconds], dtype=torch.float64, device=group.device)
    return float(group.broadcast_(told, "what was measured"))
