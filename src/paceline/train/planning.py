"""Measuring a job and its machine with all workers of a launch, for the planner."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Iterator
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.measure.machine import peak_memory_bytes
from paceline.plan.corrections import corrected
from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link, MeasuredCollective
from paceline.plan.profile import Block, Costs, LinkedCluster, Profile, Tried
from paceline.records import Cluster, Layout
from paceline.split.granularity import NUMBERS, TENSORS, granularity
from paceline.train.build import build_model, build_optimizer
from paceline.train.profiling import Measured, measure_costs, measure_division
from paceline.train.session import Datasets
from paceline.train.speeds import measure_speeds
from paceline.train.trial import LayoutTimer

BUDGET_S = 12.0
"""What measuring a job takes, about."""
_SIZES = (4, 64 << 10, 1 << 20, 16 << 20)
"""Bytes of what is exchanged."""
_CALLS_S = 0.05
"""About how long one size of one collective is repeated in a turn."""
_TURNS = 5
_LONGEST_S = 0.5
"""Sizes that would take longer are left out: a slow link is as good as a straight line by then."""


def measure_all(
    job: Job,
    datasets: Datasets,
    world: World,
    everyone: Group,
    cluster: Cluster,
    *,
    seed: int,
    precision: str = "fp32",
    threads: int | None = None,
    budget_s: float = BUDGET_S,
) -> tuple[Profile, LinkedCluster] | None:
    """What the planner has to know, on rank 0; None on the others. A collective call of all workers.

    Costs are measured with one worker alone (with one thread, and on a CPU with all of its host), and with all workers
    of a host at once; then blocks divided among those, and links; and last a layout of each way of splitting is timed.

    Args:
        threads: what the user asked each worker to have; None: the host's cores are shared out.
        budget_s: about how long all that may take, without building models and finding out where they can be split.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    _ = datasets["train"]
    base_bytes = peak_memory_bytes(world.device.type)
    peak_bytes = 0
    conditions = list(_conditions(cluster, threads))
    sizes = _micro_batches(job.batch_size, cluster.workers)
    parts = len(conditions) + 2
    found = []
    for count, active in conditions:
        group = world.group(active)
        everyone.barrier("before measuring")
        if group is not None:
            take_cores(world.local_rank, active, count)
            measured = measure_costs(
                job,
                datasets,
                seed=seed,
                device=world.device,
                sizes=sizes,
                threads=count,
                group=group if active > 1 else None,
                precision=precision,
                budget_s=budget_s / parts,
                go_on=functools.partial(_as_rank_0, group),
            )
            found.append(measured)
        peak_bytes = peak_bytes or peak_memory_bytes(world.device.type)
        everyone.barrier("after measuring")
    divided = None
    if conditions[-1][1] > 1:
        divided = _divide(
            job, datasets, world, found, conditions[-1], sizes, seed, precision, budget_s / parts / 2
        )
        everyone.barrier("after measuring divided blocks")
    within, between, meeting_s = _measure_links(world, everyone, cluster)
    layouts = _ways_of_splitting(job.batch_size, cluster, conditions[-1], can_divide=divided is not None)
    layouts = [Layout.parse(t) for t in everyone.gather_json([str(x) for x in layouts], "layouts to try")[0]]
    timer = LayoutTimer(
        job,
        layouts,
        world,
        datasets,
        seed=seed,
        precision=precision,
        budget_s=budget_s / parts * 3 / 2,
        rounds=(2, 5),
    )
    trials = timer.run() if layouts else []
    speeds = measure_speeds(job, datasets, world, everyone, cluster, seed=seed)
    if world.rank != 0:
        return None
    costs = [m.costs.model_copy(update={"meeting_s": meeting_s}) for m in found]
    if divided is not None:
        costs = [_with_divisions(one, divided) for one in costs]
    profile = Profile(
        job=job.name or "job",
        batch_size=job.batch_size,
        device=world.device.type,
        costs=tuple(costs),
        state_per_byte=max(m.state_per_byte for m in found),
        shares_update=_shares_update(job, seed, world.device),
        base_bytes=base_bytes,
        spread=max(m.spread for m in found),
    )
    linked = LinkedCluster(cluster=cluster, within=within, between=between, speeds=speeds)
    profile = _with_temporaries(profile, linked, Layout(threads=conditions[0][0]), peak_bytes)
    pauses = found[-1].pauses
    # The median step leaves out the pauses of steps that are shorter.
    steps_s = {t.layout: median(t.step_s) if pauses else t.median_step_s for t in trials if t.step_s}
    tried = [Tried(layout=layout, step_s=step_s) for layout, step_s in steps_s.items() if step_s]
    return corrected(profile, linked, tried), linked


def _divide(
    job: Job,
    datasets: Datasets,
    world: World,
    found: list[Measured],
    condition: tuple[int, int],
    sizes: list[int],
    seed: int,
    precision: str,
    budget_s: float,
) -> Costs | None:
    """The costs of all workers of a host at once, with blocks divided among them; None where that cannot be."""
    threads, active = condition
    mesh = make_mesh(world, Layout(tp=active, threads=threads))
    if mesh is None:
        return None
    try:
        return measure_division(
            job,
            datasets,
            mesh,
            found[-1].costs,
            seed=seed,
            device=world.device,
            sizes=sizes,
            precision=precision,
            budget_s=budget_s,
            go_on=functools.partial(_as_rank_0, mesh.everyone),
            pauses=found[-1].pauses,
        )
    except LayoutError:
        # All of them find this out, before the first pass.
        return None


def _with_divisions(costs: Costs, divided: Costs) -> Costs:
    """The costs with another's divisions; there is one measurement of these, with all workers at once."""
    blocks = zip(costs.blocks, divided.blocks, strict=True)
    return costs.model_copy(
        update={"blocks": tuple(b.model_copy(update={"divisions": d.divisions}) for b, d in blocks)}
    )


def _ways_of_splitting(
    batch_size: int, cluster: Cluster, condition: tuple[int, int], *, can_divide: bool
) -> list[Layout]:
    """One layout of each way of splitting over the workers of the first host, or of all, as far as the batch allows."""
    threads, here = condition
    # Where each host has one worker, over the cable between them.
    n = here if here > 1 else cluster.workers
    if n == 1:
        return []
    micro = next(m for m in (3 * n, 2 * n, n, 1) if batch_size % m == 0)
    layouts = [
        Layout(dp_replicate=n),
        Layout(dp_shard=n, zero=2),
        Layout(dp_shard=n, zero=3),
        Layout(pp=n, micro=micro),
        *([Layout(tp=n)] if can_divide else []),
    ]
    if cluster.device == "cpu":
        layouts = [layout.model_copy(update={"threads": threads}) for layout in layouts]
    return [layout for layout in layouts if batch_size % (layout.data_parallel * layout.micro) == 0]


def _with_temporaries(profile: Profile, linked: LinkedCluster, alone: Layout, peak_bytes: int) -> Profile:
    """The profile with what one process needed at its worst beyond what is known to be there: of each sample as much.

    Args:
        alone: what that process did, on whole batches.
        peak_bytes: the most that it held.
    """
    known = Forecaster(profile, linked).forecast(alone).memory.total
    each = max(0, peak_bytes - known) / profile.batch_size

    def larger(block: Block) -> Block:
        divisions = tuple(d.model_copy(update={"peak_bytes": each / d.tp}) for d in block.divisions)
        return block.model_copy(update={"peak_bytes": each, "divisions": divisions})

    costs = (c.model_copy(update={"blocks": tuple(map(larger, c.blocks))}) for c in profile.costs)
    return profile.model_copy(update={"costs": tuple(costs)})


def _as_rank_0(group: Group, wish: bool) -> bool:
    """Whether the group's rank 0 goes on; told when all have come."""
    own = torch.tensor([float(wish and group.rank == 0)], device=group.device)
    return bool(group.sum_(own, "a measured pass") > 0)


def _conditions(cluster: Cluster, threads: int | None) -> Iterator[tuple[int, int]]:
    """Threads, and workers at a time."""
    host = cluster.hosts[0]
    on_cpu = cluster.device == "cpu"
    yield threads or 1, 1
    if on_cpu and host.cores > 1 and threads is None:
        yield host.cores, 1
    if host.workers > 1:
        shared = max(1, host.cores // host.workers) if on_cpu else 1
        yield threads or shared, host.workers


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
    """Of a larger size: what the last one took beyond the smallest grows with its bytes."""
    (_, least_s), (last_bytes, last_s) = min(seconds.items()), max(seconds.items())
    return least_s + (last_s - least_s) * num_bytes / last_bytes


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
