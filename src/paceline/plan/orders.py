"""What the planner has to know of a schedule again and again, found once."""

from __future__ import annotations

import functools

from paceline.plan.schedules import make_schedule
from paceline.plan.timeline import Coded, coded, peak_of


@functools.lru_cache(maxsize=128)
def orders(schedule: str, pp: int, micro: int, stages: int | None) -> tuple[list[list[Coded]], list[int]]:
    """What each worker does, in numbers; and the worker of each stage."""
    made = make_schedule(schedule, pp, micro, stages)
    return [coded(made.actions(w)) for w in range(pp)], [made.worker_of(s) for s in range(made.num_stages)]


@functools.cache
def stages_of_workers(schedule: str, pp: int, stages: int | None) -> tuple[tuple[int, ...], ...]:
    made = make_schedule(schedule, pp, 1, stages)
    return tuple(tuple(made.stages_of(worker)) for worker in range(pp))


@functools.cache
def workers_of_stages(schedule: str, pp: int, stages: int | None) -> tuple[int, ...]:
    """The worker of each stage."""
    made = make_schedule(schedule, pp, 1, stages)
    return tuple(map(made.worker_of, range(made.num_stages)))


@functools.cache
def peak_stored(schedule: str, pp: int, micro: int, stages: int | None) -> tuple[int, ...]:
    """`Timeline.peak_stored` of a schedule, which does not depend on what its actions take."""
    return tuple(map(peak_of, orders(schedule, pp, micro, stages)[0]))
