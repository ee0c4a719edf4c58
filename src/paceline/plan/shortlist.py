"""Which layouts are worth timing, in view of their forecasts."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.plan.terms import Forecast
from paceline.plan.ways import ways_of
from paceline.records import Layout

MOST = 3
"""Layouts beside the single processes and plain data parallelism."""


def shortlist(fastest: Sequence[Forecast], always: Sequence[Layout], *, most: int = MOST) -> list[Layout]:
    """`always`, and the layouts that may be the fastest as far as their forecasts can tell: their error bars overlap.

    Of those that split in the same way over as many workers only the fastest: they differ by less than forecasts err.

    Args:
        fastest: forecasts, the fastest first.
        always: to be timed whatever their forecasts: single processes and plain data parallelism, so that nothing
            slower than these is ever taken.
    """
    found = list(always)
    if not fastest:
        return found
    reach_s = fastest[0].step_s + fastest[0].error_s
    seen: set[tuple[object, ...]] = set()
    added = 0
    for forecast in fastest:
        layout = forecast.layout
        if forecast.step_s - forecast.error_s > reach_s:
            continue
        kind = (layout.workers, ways_of(layout), layout.pp, layout.tp, layout.threads)
        if kind in seen:
            continue
        seen.add(kind)
        if layout not in found and added < most:
            found.append(layout)
            added += 1
    return found
