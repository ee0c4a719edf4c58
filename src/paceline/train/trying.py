"""Trying layouts while a job is measured: a few steps of each, spread over as much of the time as can be."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.job import Job
from paceline.measure.machine import available_memory_bytes
from paceline.plan.profile import Tried
from paceline.records import Layout, Trial
from paceline.train.session import Datasets
from paceline.train.trial import time_by_turns

_FIRST_ROUNDS = (2, 3)
"""Of the first visit, at least and at most: it tells what steps hold, and about how long they take."""
_ROUNDS = (4, 6)
"""Of further visits to a slow layout: two steps say little on a machine that others use."""
_TURNS, _TURN_S, _STEPS = (4, 10), 0.1, 3
"""Rounds of the fast ones, about how long each takes, and its steps at least."""
_TIMES = 4
"""So many times as long as a visit all turns of a fast layout may take, what builds it and warms it up included."""
_SLOW_TIMES, _CHEAP_S = 4.0, 0.1
"""A layout is slow whose step takes so many times as long as the fastest one's, and is not cheap."""
_SHARE_OF_ROOM = 0.4
"""Of the memory that is available, what layouts that take turns may hold together."""
_MOST_AGAIN_S = 40.0
"""After so long no further visit is begun but the first to each: large models take seconds to build."""
_AGREE = 0.08
"""Two visits that differ by less tell what a step takes."""
_MOST_AGAIN = 8
"""Layouts that are visited a third time."""


def try_layouts(
    groups: Sequence[Sequence[Layout]],
    job: Job,
    world: World,
    everyone: Group,
    datasets: Datasets,
    *,
    budget_s: float,
    pauses: bool,
    **about: Any,
) -> list[list[Trial]]:
    """Time the layouts that rank 0 gives; of each its trials.

    What else runs on a machine comes and goes, and a visit of a second sees one moment of it. So each is visited once
    by itself, which tells what it holds; then the fast ones take turns, as many of them as there is memory for, for a
    few steps each time. The slow ones are visited again one after the other, and a third time if they differ.

    A collective call of all workers, which all return the same.

    Args:
        groups, about: as of `time_by_turns`.
        budget_s: of one layout, for each visit.
        pauses: as `Measured.pauses`; looked at on rank 0 alone.
    """

    def visit(some: Sequence[Sequence[Layout]], times: float = 1, **how: Any) -> list[Trial]:
        number = everyone.gather_json(sum(map(len, some)), "how many layouts are tried")[0]
        budget = times * budget_s * number
        return time_by_turns(some, job, world, everyone, datasets, budget_s=budget, **about, **how)

    found: dict[Layout, list[Trial]] = {}
    for trial in visit(groups, rounds=_FIRST_ROUNDS, evaluates=True):
        found[trial.layout] = [trial]
    until_s = time.monotonic() + _MOST_AGAIN_S
    timed = [[layout for layout in group if found[layout][0].error is None] for group in groups]
    timed = sorted(filter(None, timed), key=lambda group: fastest_s(group, found, pauses=pauses))
    room = _SHARE_OF_ROOM * _room_bytes(world, everyone)
    turns = list(taking_turns(timed, found, room, pauses=pauses))
    how: dict[str, Any] = {"rounds": _TURNS, "round_s": _TURN_S, "fewest_steps": _STEPS}
    for trial in visit(turns, _TIMES, until_s=until_s, **how):
        found[trial.layout].append(trial)
    fast = {layout for together in turns for layout in together}
    slow = [group for group in timed if not fast.issuperset(group)]
    for _ in range(2):
        for trial in visit(slow, rounds=_ROUNDS, until_s=until_s):
            found[trial.layout].append(trial)
        slow = groups_again(slow, found, pauses=pauses)
    return list(found.values())


def taking_turns(
    groups: Sequence[Sequence[Layout]],
    found: Mapping[Layout, Sequence[Trial]],
    room_bytes: float,
    *,
    pauses: bool,
) -> Iterator[list[Layout]]:
    """The fast ones of the groups, as many in each list as there is room for; none where what they hold is not known.

    Args:
        groups: layouts that share a replica of the model, the fastest first.
        room_bytes: of each worker.
    """
    if not groups or room_bytes <= 0:
        return
    limit_s = max(_CHEAP_S, _SLOW_TIMES * fastest_s(groups[0], found, pauses=pauses))
    together: list[Layout] = []
    held_bytes = 0.0
    for group in groups:
        known = [grown for layout in group if (grown := found[layout][0].grown_bytes) is not None]
        more_bytes = max(known, default=math.inf)
        if fastest_s(group, found, pauses=pauses) > limit_s or more_bytes > room_bytes:
            continue
        if held_bytes + more_bytes > room_bytes:
            yield together
            together, held_bytes = [], 0.0
        together = [*together, *group]
        held_bytes += more_bytes
    if together:
        yield together


def fastest_s(group: Sequence[Layout], found: Mapping[Layout, Sequence[Trial]], *, pauses: bool) -> float:
    """Seconds of a step, by their first visits."""
    return min(_visit_s(found[layout][0], pauses=pauses) or math.inf for layout in group)


def _room_bytes(world: World, everyone: Group) -> float:
    """What each worker may take of the memory that is free; 0 where that is not known."""
    kind = world.device.type
    sharing = world.local_size if kind == "cpu" else 1
    free = available_memory_bytes(kind) / sharing
    rooms: list[float] = everyone.gather_json(free, "memory for layouts that take turns")
    return min(rooms)


def groups_again(
    groups: Sequence[Sequence[Layout]], found: Mapping[Layout, Sequence[Trial]], *, pauses: bool
) -> list[list[Layout]]:
    """Those of the layouts whose visits differ most, and by more than a little."""
    apart: dict[Layout, float] = {}
    for layout in (layout for group in groups for layout in group):
        steps_s = [step_s for one in found[layout] if (step_s := _visit_s(one, pauses=pauses))]
        if len(steps_s) > 1 and max(steps_s) > (1 + _AGREE) * min(steps_s):
            apart[layout] = max(steps_s) / min(steps_s)
    most = set(sorted(apart, key=lambda layout: -apart[layout])[:_MOST_AGAIN])
    some = ([layout for layout in group if layout in most] for group in groups)
    return [group for group in some if group]


def tried(visits: Sequence[Trial], empty_bytes: int, *, pauses: bool) -> Tried | None:
    """What the visits to one layout tell; None if it could not be timed.

    The first is short, and right after the model was built: it tells what steps take where there is no other.

    Args:
        empty_bytes: what a worker holds without a model.
        pauses: as `Measured.pauses`.
    """
    first = visits[0]
    steps_s = [step_s for one in visits[1:] or [first] if (step_s := _visit_s(one, pauses=pauses))]
    if not steps_s:
        return None
    peak, evaluating = (
        None if grown is None else empty_bytes + grown
        for grown in (first.grown_bytes, first.evaluation_grown_bytes)
    )
    return Tried(
        layout=first.layout, step_s=median(steps_s), peak_bytes=peak, evaluation_peak_bytes=evaluating
    )


def _visit_s(trial: Trial, *, pauses: bool) -> float | None:
    """Seconds of a step. The median step leaves out the pauses of steps that are shorter than those."""
    if not trial.step_s:
        return None
    return median(trial.step_s) if pauses else trial.median_step_s
