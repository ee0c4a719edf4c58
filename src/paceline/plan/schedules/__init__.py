"""Pipeline schedules, free of torch: the same orders are run by the workers and played through by the planner."""

from __future__ import annotations

import difflib

from paceline.errors import LayoutError
from paceline.plan.schedules.base import Action, Schedule
from paceline.plan.schedules.breadth_first import BreadthFirst
from paceline.plan.schedules.gpipe import GPipe
from paceline.plan.schedules.interleaved import Interleaved
from paceline.plan.schedules.one_f_one_b import OneForwardOneBackward
from paceline.plan.schedules.zero_bubble import ZeroBubble, ZeroBubbleV

__all__ = ["SCHEDULES", "Action", "Schedule", "make_schedule"]

SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule
    for schedule in (GPipe, OneForwardOneBackward, Interleaved, BreadthFirst, ZeroBubble, ZeroBubbleV)
}


def make_schedule(name: str, pp: int, num_micro: int, stages_per_worker: int | None = None) -> Schedule:
    """The schedule of this name.

    Raises:
        LayoutError: there is none, or it cannot give a worker so many stages.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        raise LayoutError(
            f"there is no pipeline schedule {name!r}",
            cause=f"perhaps {near[0]!r} was meant" if near else "",
            next_step=f"use one of {', '.join(SCHEDULES)}",
        )
    kind = SCHEDULES[name]
    most = kind.most_stages
    given = stages_per_worker or kind.default_stages
    if most is not None and given != most:
        raise LayoutError(
            f"stages={given} with schedule={name}",
            cause=f"{name} gives each worker {most} stage{'s' if most > 1 else ''}",
            next_step=f"leave stages out, or use schedule=interleaved,stages={max(given, 2)}",
        )
    return kind(pp, num_micro, given)
