"""Measuring a job and its machine with all workers of a launch, for the planner."""

from __future__ import annotations

import functools
import gc
from collections.abc import Sequence
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh, tensor_mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.measure.machine import file_memory_bytes, held_memory_bytes, launcher_memory_bytes
from paceline.plan.corrections import corrected
from paceline.plan.fitting import why_not
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Block, Costs, LinkedCluster, Profile
from paceline.plan.tries import layouts_to_try, sizes_divided
from paceline.records import Cluster, Layout
from paceline.split.granularity import NUMBERS, TENSORS, granularity
from paceline.train.allocator import give_back_freed_memory
from paceline.train.block_costs import BlockCosts
from paceline.train.block_memory import can_hold_divided, with_memory_of_blocks
from paceline.train.build import build_model, build_optimizer
from paceline.train.conditions import as_rank_0, conditions_of, under_conditions
from paceline.train.garbage import only_what_is_made
from paceline.train.held_memory import HeldMemory, load_splitting, measure_held_memory
from paceline.train.link_speeds import measure_links
from paceline.train.profiling import Measured, measure_costs, measure_division
from paceline.train.session import Datasets
from paceline.train.speeds import measure_speeds
from paceline.train.trying import tried, try_layouts
from paceline.train.whole_model import why_block_by_block

BUDGET_S = 12.0
"""What measuring a job takes, about."""
_TRY = 0.04
"""Share of that which is for each visit to a layout that is tried, on top of the rest."""

_LEAST_UNUSUAL = 0.15
"""Of a step: by so much more or less what is computed again must take than it should, to be believed."""


@only_what_is_made()
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
    why_in_blocks: str | None = None,
) -> tuple[Profile, LinkedCluster] | None:
    """What the planner has to know, on rank 0; None on the others. A collective call of all workers.

    Costs are measured with one worker alone (with one thread, and on a CPU with all of its host), and with all workers
    of a host at once; then blocks divided among those, and links; and last layouts of each way of splitting are timed,
    those that are forecast to fit.

    Args:
        threads: what the user asked each worker to have; None: the host's cores are shared out.
        budget_s: about how long all that may take, without building models, finding out where they can be split, and
            timing the layouts.
        why_in_blocks: measure block by block, for this reason; empty: with the whole model in each worker; None: whole
            where there is room.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    # What a run reads is there, of both splits, when memory is measured.
    _ = datasets["train"], datasets["test"]
    about: dict[str, Any] = {"seed": seed, "precision": precision}
    splitting = load_splitting(world.device)
    if why_in_blocks is None:
        why_in_blocks = why_block_by_block(job, datasets, world, everyone, **about)
    conditions = list(conditions_of(cluster.hosts[0], threads))
    sizes = _micro_batches(job.batch_size, cluster.workers, world.device.type)
    parts = len(conditions) + 2
    held, blocks = None, None
    if why_in_blocks:
        take_cores(world.local_rank, world.local_size, threads)
        blocks = BlockCosts(job, datasets, device=world.device, sizes=sizes, **about)
    elif world.rank == 0:
        take_cores(0, 1, threads or 1)
        held = measure_held_memory(job, datasets, device=world.device, splitting=splitting, **about)
    everyone.barrier("after memory was measured")

    def measure(group: Group, count: int) -> Measured:
        how: dict[str, Any] = {
            "threads": count,
            "group": group if group.size > 1 else None,
            "budget_s": budget_s / parts,
            "go_on": functools.partial(as_rank_0, group),
        }
        if blocks is not None:
            return blocks.measure(**how)
        return measure_costs(job, datasets, device=world.device, sizes=sizes, **how, **about)

    found = under_conditions(conditions, world, everyone, measure)
    speeds = measure_speeds(job, datasets, world, everyone, cluster, seed=seed, blocks=blocks)
    blocks = None
    gc.collect()
    give_back_freed_memory()
    kind = world.device.type
    empty, files = held_memory_bytes(kind), file_memory_bytes(kind)
    profile = None
    if world.rank == 0:
        profile = Profile(
            job=job.name or "job",
            batch_size=job.batch_size,
            device=kind,
            costs=tuple(m.costs for m in found),
            state_per_byte=max(m.state_per_byte for m in found),
            shares_update=_shares_update(job, seed, world.device, in_parts=bool(why_in_blocks)),
            base_bytes=0,
            spread=max(m.spread for m in found),
            why_in_blocks=why_in_blocks,
        )
    within, between, meeting_s = measure_links(world, everyone, cluster)
    linked = LinkedCluster(
        cluster=cluster,
        within=within,
        between=between,
        speeds=speeds,
        launcher_bytes=launcher_memory_bytes() if kind == "cpu" else 0,
    )
    threads_of_all, here = conditions[-1]
    among = sizes_divided(cluster)
    if why_in_blocks:
        fits = [profile is not None and can_hold_divided(profile, linked, empty, tp) for tp in among]
        told = everyone.gather_json(fits, "whether divided blocks can be measured")[0]
        among = [tp for tp, has_room in zip(among, told, strict=True) if has_room]
    divided: list[Costs] = []
    for tp in among:
        take_cores(world.local_rank, here, threads_of_all)
        at_once = Layout(dp_replicate=max(1, here // tp), tp=tp, threads=threads_of_all)
        costs = _divide(job, datasets, world, found, at_once, sizes, seed, precision, budget_s / parts / 2)
        divided += [costs] if costs is not None else []
        gc.collect()
        everyone.barrier("after measuring divided blocks")
    groups: list[list[Layout]] = []
    if profile is not None:
        measured = [one.model_copy(update={"meeting_s": meeting_s}) for one in profile.costs]
        measured = [_with_divisions(one, divided, job.batch_size) for one in measured]
        profile = profile.model_copy(update={"costs": tuple(measured)})
        if held is None:
            profile = with_memory_of_blocks(profile, empty, files, splitting)
        else:
            profile = _with_memory(profile, linked, conditions[0][0], held)
        forecaster = Forecaster(profile, linked)
        world.known.cuts_of = forecaster.cuts_of
        possible = sorted({d.tp for block in measured[0].blocks for d in block.divisions}, reverse=True)
        every = layouts_to_try(job.batch_size, cluster, threads_of_all, divided=possible)
        fit = ([layout for layout in group if not why_not(forecaster, layout)] for group in every)
        groups = [group for group in fit if group]
    pauses = bool(found) and found[-1].pauses
    trials = try_layouts(
        groups, job, world, everyone, datasets, budget_s=budget_s * _TRY, pauses=pauses, **about
    )
    if profile is None:
        return None
    bare, more = (empty - splitting, splitting) if held is None else (held.empty, held.splitting)
    told = (tried(of_one, bare + more * of_one[0].layout.splits_model, pauses=pauses) for of_one in trials)
    return corrected(profile, linked, [one for one in told if one is not None]), linked


def _divide(
    job: Job,
    datasets: Datasets,
    world: World,
    found: list[Measured],
    layout: Layout,
    sizes: list[int],
    seed: int,
    precision: str,
    budget_s: float,
) -> Costs | None:
    """The costs of all workers of a host at once, with blocks divided as by `layout`, its data-parallel parts each for
    themselves; None where that cannot be."""
    mesh = make_mesh(world, layout)
    if mesh is None:
        return None
    # Costs were measured on the first host only.
    own = [found[-1].costs.to_json(), found[-1].pauses] if found else None
    costs, pauses = mesh.everyone.gather_json(own, "the costs of whole blocks")[0]
    try:
        return measure_division(
            job,
            datasets,
            tensor_mesh(mesh),
            Costs.from_json(costs),
            seed=seed,
            device=world.device,
            sizes=sizes,
            precision=precision,
            budget_s=budget_s,
            go_on=functools.partial(as_rank_0, mesh.everyone),
            pauses=pauses,
        )
    except LayoutError:
        # All of them find this out, before the first pass.
        return None


def _with_divisions(costs: Costs, divided: Sequence[Costs], samples: float) -> Costs:
    """The costs with the divisions of others, one for each size.

    These are measured with all workers at once alone: where fewer are at work a divided block takes as much less as the
    whole model does, on so many samples.
    """
    blocks = []
    for at, block in enumerate(costs.blocks):
        divisions = []
        for one in divided:
            times = _pass_s(costs, samples) / _pass_s(one, samples)
            divisions += [
                d.model_copy(
                    update={
                        "forward_s": d.forward_s.scaled(times),
                        "backward_s": d.backward_s.scaled(times),
                    }
                )
                for d in one.blocks[at].divisions
            ]
        blocks.append(block.model_copy(update={"divisions": tuple(divisions)}))
    return costs.model_copy(update={"blocks": tuple(blocks)})


def _pass_s(costs: Costs, samples: float) -> float:
    return sum(block.forward_s(samples) + block.backward_s(samples) for block in costs.model)


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
    more = {
        how: rest(one.peak, found, Layout(threads=threads).model_copy(update={"recompute": how}))
        / profile.batch_size
        for how, one in held.recomputed.items()
    }
    shares = {how: _shares_again(found, held, how) for how in held.recomputed}
    return found.model_copy(update={"recomputed_bytes": more, "recomputed_shares": shares})


def _shares_again(profile: Profile, held: HeldMemory, how: str) -> tuple[tuple[float, float], ...]:
    """What computing again takes of a forward pass, by its samples, from steps with and without it."""
    recomputed = held.recomputed[how]
    row, found = profile.costs[0].model, {}
    for micro, plain_s, taken_s in zip((1, held.micro), held.step_s, recomputed.step_s, strict=True):
        samples = profile.batch_size / micro
        forward_s = micro * sum(block.forward_s(samples) for block in row)
        usual_s = (
            forward_s if how == "full" else micro * sum(b.selective_share * b.forward_s(samples) for b in row)
        )
        if abs(taken_s - plain_s - usual_s) <= _LEAST_UNUSUAL * plain_s:
            # A step or two say no more than that it takes about what it should.
            taken_s = plain_s + usual_s
        found[samples] = max(0.0, taken_s - plain_s) / forward_s
    return tuple(sorted(found.items()))


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


def _micro_batches(batch_size: int, workers: int, device: str) -> list[int]:
    """Sizes from a whole batch down to what a worker has of one of four micro-batches.

    On a GPU more of them: small ones take as long as it takes to launch them, and no line goes through both ends.
    Two samples at least: batch norm has no statistics of one alone, and its workers take those of all together.
    """
    parts = (1, workers, 4 * workers) if device == "cpu" else (1, *(n * workers for n in (1, 2, 4, 8)))
    return sorted({max(min(2, batch_size), batch_size // n) for n in parts})


def _shares_update(job: Job, seed: int, device: torch.device, *, in_parts: bool) -> bool:
    model, deferred = build_model(job, seed, device, None, in_parts=in_parts)
    trained = [p for p in model.parameters() if p.requires_grad]
    return granularity(build_optimizer(job, trained, deferred)) in (NUMBERS, TENSORS)
