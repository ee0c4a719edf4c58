"""Trying layouts while a job is measured: a few steps of each, at more than one moment."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.job import Job
from paceline.plan.profile import Tried
from paceline.records import Layout, Trial
from paceline.train.session import Datasets
from paceline.train.trial import time_by_turns

_ROUNDS = (4, 6)
"""Of a visit, at least and at most: two steps of a slow layout say little on a machine that others use."""
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
    """Time the layouts that rank 0 gives twice, and a third time those that differ most; of each its trials.

    What else runs on a machine comes and goes, and a visit of a second sees one moment of it; from one to the next to
    the same layout all others are visited. The first finds out what steps hold, too.

    A collective call of all workers, which all return the same.

    Args:
        groups, about: as of `time_by_turns`.
        budget_s: of one layout, for each visit.
        pauses: as `Measured.pauses`; looked at on rank 0 alone.
    """

    def visit(some: Sequence[Sequence[Layout]], **how: Any) -> list[Trial]:
        number = everyone.gather_json(sum(map(len, some)), "how many layouts are tried")[0]
        return time_by_turns(
            some, job, world, everyone, datasets, budget_s=budget_s * number, rounds=_ROUNDS, **about, **how
        )

    found: dict[Layout, list[Trial]] = {}
    for trial in visit(groups, evaluates=True):
        found[trial.layout] = [trial]
    until_s = time.monotonic() + _MOST_AGAIN_S
    timed = [[layout for layout in group if found[layout][0].error is None] for group in groups]

    def fastest_s(group: Sequence[Layout]) -> float:
        return min(_visit_s(found[layout][0], pauses=pauses) or math.inf for layout in group)

    for trial in visit(sorted(filter(None, timed), key=fastest_s), until_s=until_s):
        found[trial.layout].append(trial)
    for trial in visit(groups_again(groups, found, pauses=pauses), until_s=until_s):
        found[trial.layout].append(trial)
    return list(found.values())


def groups_again(
    groups: Sequence[Sequence[Layout]], found: Mapping[Layout, Sequence[Trial]], *, pauses: bool
) -> list[list[Layout]]:
    """Those of the layouts whose visits differ most, and by more than a little."""
    apart: dict[Layout, float] = {}
    for layout, visits in found.items():
        steps_s = [step_s for one in visits if (step_s := _visit_s(one, pauses=pauses))]
        if len(steps_s) > 1 and max(steps_s) > (1 + _AGREE) * min(steps_s):
            apart[layout] = max(steps_s) / min(steps_s)
    most = set(sorted(apart, key=lambda layout: -apart[layout])[:_MOST_AGAIN])
    some = ([layout for layout in group if layout in most] for group in groups)
    return [group for group in some if group]


def tried(visits: Sequence[Trial], empty_bytes: int, *, pauses: bool) -> Tried | None:
    """What the visits to one layout tell; None if it could not be timed.

    Args:
        empty_bytes: what a worker holds without a model.
        pauses: as `Measured.pauses`.
    """
    steps_s = [step_s for one in visits if (step_s := _visit_s(one, pauses=pauses))]
    if not steps_s:
        return None
    first = visits[0]
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
