"""Pipeline schedules, free of torch: the same orders are run by the workers and played through by the planner."""

from __future__ import annotations

import difflib

from paceline.errors import LayoutError
from paceline.plan.schedules.base import Action, InvalidScheduleError, Schedule, check
from paceline.plan.schedules.breadth_first import BreadthFirst
from paceline.plan.schedules.gpipe import GPipe
from paceline.plan.schedules.interleaved import Interleaved
from paceline.plan.schedules.one_f_one_b import OneForwardOneBackward
from paceline.plan.schedules.zero_bubble import ZeroBubble
from paceline.plan.schedules.zero_bubble_v import ZeroBubbleV

__all__ = ["SCHEDULES", "Action", "InvalidScheduleError", "Schedule", "check", "make_schedule"]

SCHEDULES: dict[str, type[Schedule]] = {
    schedule.name: schedule
    for schedule in (GPipe, OneForwardOneBackward, Interleaved, BreadthFirst, ZeroBubble, ZeroBubbleV)
}


def make_schedule(name: str, pp: int, num_micro: int, stages_per_worker: int | None = None) -> Schedule:
    """The schedule of this name.

    Raises:
        LayoutError: there is none, a size is below 1, or it cannot give a worker so many stages.
    """
    if name not in SCHEDULES:
        near = difflib.get_close_matches(name, SCHEDULES, n=1)
        raise LayoutError(
            f"there is no pipeline schedule {name!r}",
            cause=f"perhaps {near[0]!r} was meant" if near else "",
            next_step=f"use one of {', '.join(SCHEDULES)}",
        )
    return SCHEDULES[name](pp, num_micro, stages_per_worker)
