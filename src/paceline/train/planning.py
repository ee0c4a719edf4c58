"""Measuring a job and its machine with all workers of a launch, for the planner."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.job import Job
from paceline.measure.machine import peak_memory_bytes
from paceline.plan.curves import Curve
from paceline.plan.links import Link, MeasuredCollective
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Cluster
from paceline.split.granularity import NUMBERS, TENSORS, granularity
from paceline.train.build import build_model, build_optimizer
from paceline.train.profiling import measure_costs
from paceline.train.session import Datasets
from paceline.train.speeds import measure_speeds

_SIZES = (4, 64 << 10, 1 << 20, 16 << 20)
"""Bytes of what is exchanged."""
_CALLS_S = 0.05
"""About how long one size of one collective is repeated in a turn."""
_TURNS = 5
_LONGEST_S = 0.5
"""Sizes that would take longer are left out: a slow link is as good as a straight line by then."""


def measure_all(
    job: Job, datasets: Datasets, world: World, everyone: Group, cluster: Cluster, *, seed: int
) -> tuple[Profile, LinkedCluster] | None:
    """What the planner has to know, on rank 0; None on the others. A collective call of all workers.

    Costs are measured with one worker alone (with one thread, and on a CPU with all of its host), and with all workers
    of a host at once, each by itself.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    base_bytes = peak_memory_bytes(world.device.type)
    found = []
    for threads, active in _conditions(cluster):
        group = world.group(active)
        everyone.barrier("before measuring")
        if group is not None:
            take_cores(world.local_rank, active, threads)
            found.append(
                measure_costs(
                    job,
                    datasets,
                    seed=seed,
                    device=world.device,
                    sizes=_micro_batches(job.batch_size, cluster.workers),
                    threads=threads,
                    active=active,
                    go_on=functools.partial(_as_rank_0, group),
                )
            )
        everyone.barrier("after measuring")
    within, between, meeting_s = _measure_links(world, everyone, cluster)
    speeds = measure_speeds(job, datasets, world, everyone, cluster, seed=seed)
    if world.rank != 0:
        return None
    profile = Profile(
        job=job.name or "job",
        batch_size=job.batch_size,
        device=world.device.type,
        costs=tuple(m.costs.model_copy(update={"meeting_s": meeting_s}) for m in found),
        state_per_byte=max(m.state_per_byte for m in found),
        shares_update=_shares_update(job, seed, world.device),
        base_bytes=base_bytes,
        spread=max(m.spread for m in found),
    )
    return profile, LinkedCluster(cluster=cluster, within=within, between=between, speeds=speeds)


def _as_rank_0(group: Group, wish: bool) -> bool:
    """Whether the group's rank 0 goes on; told when all have come."""
    own = torch.tensor([float(wish and group.rank == 0)], device=group.device)
    return bool(group.sum_(own, "a measured pass") > 0)


def _conditions(cluster: Cluster) -> Iterator[tuple[int, int]]:
    """Threads, and workers at a time."""
    host = cluster.hosts[0]
    yield 1, 1
    if cluster.device == "cpu" and host.cores > 1:
        yield host.cores, 1
    if host.workers > 1:
        threads = max(1, host.cores // host.workers) if cluster.device == "cpu" else 1
        yield threads, host.workers


def _micro_batches(batch_size: int, workers: int) -> list[int]:
    """Sizes from a whole batch down to what a worker has of one of four micro-batches.

    Two samples at least: batch norm has no statistics of one alone, and its workers take those of all together.
    """
    return sorted({max(min(2, batch_size), batch_size // n) for n in (1, workers, 4 * workers)})


def _measure_links(world: World, everyone: Group, cluster: Cluster) -> tuple[Link, Link | None, float]:
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


def _shares_update(job: Job, seed: int, device: torch.device) -> bool:
    model, deferred = build_model(job, seed, device, None, in_parts=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return granularity(build_optimizer(job, trained, deferred)) in (NUMBERS, TENSORS)
