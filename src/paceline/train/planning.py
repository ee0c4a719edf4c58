"""Measuring a job and its machine with all workers of a launch, for the planner."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.measure.machine import launcher_memory_bytes
from paceline.plan.corrections import corrected
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import MOST_SPREAD, Block, Costs, LinkedCluster, Profile, Tried
from paceline.plan.tries import layouts_to_try
from paceline.records import Cluster, Host, Layout, Trial
from paceline.split.granularity import NUMBERS, TENSORS, granularity
from paceline.train.build import build_model, build_optimizer
from paceline.train.held_memory import HeldMemory, measure_held_memory
from paceline.train.link_speeds import measure_links
from paceline.train.profiling import Measured, measure_costs, measure_division
from paceline.train.session import Datasets
from paceline.train.speeds import measure_speeds
from paceline.train.trial import LayoutTimer

BUDGET_S = 12.0
"""What measuring a job takes, about."""
_TRY = 0.04
"""Share of that which is for each layout that is tried, on top of the rest."""
_ATTEMPTS = 2
"""Measurements of one condition, where the first is too noisy to plan with: the less noisy one counts."""


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
    of a host at once; then blocks divided among those, and links; and last layouts of each way of splitting are timed.

    Args:
        threads: what the user asked each worker to have; None: the host's cores are shared out.
        budget_s: about how long all that may take, without building models, finding out where they can be split, and
            timing the layouts.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    # What a run reads is there, of both splits, when memory is measured.
    _ = datasets["train"], datasets["test"]
    held = None
    if world.rank == 0:
        take_cores(0, 1, threads or 1)
        held = measure_held_memory(job, datasets, seed=seed, device=world.device, precision=precision)
    everyone.barrier("after memory was measured")
    conditions = list(conditions_of(cluster.hosts[0], threads))
    sizes = _micro_batches(job.batch_size, cluster.workers)
    parts = len(conditions) + 2
    found = []
    for count, active in conditions:
        group = world.group(active)
        attempts: list[Measured] = []
        for _ in range(_ATTEMPTS):
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
                attempts.append(measured)
            spreads = everyone.gather_json([one.spread for one in attempts], "how noisy it was")[0]
            if spreads[-1] <= MOST_SPREAD:
                break
        if attempts:
            found.append(attempts[spreads.index(min(spreads))])
        everyone.barrier("after measuring")
    divided = None
    if conditions[-1][1] > 1:
        divided = _divide(
            job, datasets, world, found, conditions[-1], sizes, seed, precision, budget_s / parts / 2
        )
        everyone.barrier("after measuring divided blocks")
    within, between, meeting_s = measure_links(world, everyone, cluster)
    trials = _try(
        job, datasets, world, everyone, cluster, conditions[-1][0], seed, precision, budget_s, divided
    )
    speeds = measure_speeds(job, datasets, world, everyone, cluster, seed=seed)
    if held is None:
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
        base_bytes=0,
        spread=max(m.spread for m in found),
    )
    linked = LinkedCluster(
        cluster=cluster,
        within=within,
        between=between,
        speeds=speeds,
        launcher_bytes=launcher_memory_bytes() if world.device.type == "cpu" else 0,
    )
    profile = _with_memory(profile, linked, conditions[0][0], held)
    pauses = found[-1].pauses
    # The median step leaves out the pauses of steps that are shorter.
    steps_s = {t.layout: median(t.step_s) if pauses else t.median_step_s for t in trials if t.step_s}
    tried = [
        Tried(
            layout=t.layout,
            step_s=step_s,
            peak_bytes=_peak_bytes(held, t.layout, t.grown_bytes),
            evaluation_peak_bytes=_peak_bytes(held, t.layout, t.evaluation_grown_bytes),
        )
        for t in trials
        if (step_s := steps_s.get(t.layout))
    ]
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


def _try(
    job: Job,
    datasets: Datasets,
    world: World,
    everyone: Group,
    cluster: Cluster,
    threads: int,
    seed: int,
    precision: str,
    budget_s: float,
    divided: Costs | None,
) -> list[Trial]:
    """Time what `layouts_to_try` says on rank 0: one replica of the model after the other, as not all may fit."""
    groups = layouts_to_try(job.batch_size, cluster, threads, can_divide=divided is not None)
    texts = [[str(layout) for layout in group] for group in groups]
    trials = []
    for group in everyone.gather_json(texts, "layouts to try")[0]:
        timer = LayoutTimer(
            job,
            [Layout.parse(text) for text in group],
            world,
            datasets,
            seed=seed,
            precision=precision,
            budget_s=budget_s * _TRY * len(group),
            rounds=(2, 5),
            evaluates=True,
        )
        trials += timer.run()
    return trials


def _with_memory(profile: Profile, linked: LinkedCluster, threads: int, held: HeldMemory) -> Profile:
    """The profile with what one process held beyond what is known to be there: of each sample as much, and the rest."""

    def rest(peak_bytes: int, found: Profile, layout: Layout) -> int:
        """What a step held beyond its forecast."""
        return peak_bytes - Forecaster(found, linked).memories(layout)[0].total

    whole = rest(held.peak, profile, Layout(threads=threads))
    in_parts = rest(held.peak_in_parts, profile, Layout(micro=held.micro, threads=threads))
    fewer = profile.batch_size - profile.batch_size // held.micro
    each = max(0, whole - in_parts) / fewer if fewer else 0.0

    def larger(block: Block) -> Block:
        divisions = tuple(d.model_copy(update={"peak_bytes": each / d.tp}) for d in block.divisions)
        return block.model_copy(update={"peak_bytes": each, "divisions": divisions})

    costs = (c.model_copy(update={"blocks": tuple(map(larger, c.blocks))}) for c in profile.costs)
    every = max(0, round(whole - each * profile.batch_size))
    files = min(held.files, every)
    found = profile.model_copy(
        update={
            "costs": tuple(costs),
            "base_bytes": every - files,
            "mapped_bytes": files,
            "splitting_bytes": held.splitting,
        }
    )
    found = _with_evaluation(found, linked, threads, held)
    if held.peak_recomputed is None:
        return found
    layout = Layout(recompute="full", threads=threads)
    more = rest(held.peak_recomputed, found, layout)
    return found.model_copy(update={"recomputed_bytes": more / profile.batch_size})


def _with_evaluation(profile: Profile, linked: LinkedCluster, threads: int, held: HeldMemory) -> Profile:
    """The same of an evaluation."""
    more = held.evaluation_samples - held.fewer_samples
    each = max(0, held.evaluation - held.evaluation_in_parts) / more if more else 0.0
    # Parameters, state and what is there whatever the model.
    _, kept = Forecaster(profile, linked).memories(Layout(threads=threads))
    return profile.model_copy(
        update={
            "evaluation_samples": held.evaluation_samples,
            "evaluated_bytes": each,
            "evaluation_bytes": held.evaluation - kept.total - each * held.evaluation_samples,
        }
    )


def _peak_bytes(held: HeldMemory, layout: Layout, grown_bytes: int | None) -> int | None:
    """What a worker of the layout holds whose memory grows by so much from when it has no model."""
    if grown_bytes is None:
        return None
    return held.empty + (held.splitting if layout.splits_model else 0) + grown_bytes


def _as_rank_0(group: Group, wish: bool) -> bool:
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


def _micro_batches(batch_size: int, workers: int) -> list[int]:
    """Sizes from a whole batch down to what a worker has of one of four micro-batches.

    Two samples at least: batch norm has no statistics of one alone, and its workers take those of all together.
    """
    return sorted({max(min(2, batch_size), batch_size // n) for n in (1, workers, 4 * workers)})


def _shares_update(job: Job, seed: int, device: torch.device) -> bool:
    model, deferred = build_model(job, seed, device, None, in_parts=False)
    trained = [p for p in model.parameters() if p.requires_grad]
    return granularity(build_optimizer(job, trained, deferred)) in (NUMBERS, TENSORS)
