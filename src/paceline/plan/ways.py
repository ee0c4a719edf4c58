"""The ways in which a layout splits a job."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paceline.plan.places import Places
from paceline.plan.profile import ALONE, COPIES, DATA, GATHERED, PIPELINE, SHARDED, TENSOR, Correction
from paceline.records import Layout


def ways_of(layout: Layout) -> tuple[str, ...]:
    """The ways in which a layout splits a job; `ALONE` where it does not."""
    if layout.workers == 1:
        return (ALONE,)
    found = []
    if layout.dp_shard > 1:
        found.append(GATHERED if layout.zero_stage == 3 else SHARDED)
        if layout.dp_replicate > 1:
            found.append(COPIES)
    elif layout.dp_replicate > 1:
        found.append(DATA)
    if layout.tp > 1:
        found.append(TENSOR)
    if layout.pp > 1:
        found.append(PIPELINE)
    return tuple(found)


def size_of(layout: Layout, ways: Sequence[str]) -> int:
    """Among how many workers a layout splits in a way; in several: all of them."""
    if len(ways) > 1:
        return layout.workers
    sizes = {
        ALONE: 1,
        DATA: layout.data_parallel,
        COPIES: layout.dp_replicate,
        TENSOR: layout.tp,
        PIPELINE: layout.pp,
    }
    return sizes.get(ways[0], layout.dp_shard)


def is_over_network(layout: Layout, ways: Sequence[str], places: Places) -> bool:
    """Whether those among whom a layout splits in a way are on several hosts; in several ways: any of them."""
    axes = {DATA: "data", COPIES: "dp_replicate", TENSOR: "tp", PIPELINE: "pp"}
    return any(places.of(layout, axes.get(way, "dp_shard")).hosts > 1 for way in ways)


def corrections_of(
    corrections: Sequence[Correction], layout: Layout, ways: tuple[str, ...], places: Places
) -> list[tuple[Correction, float]]:
    """What was found of splitting so, each with its weight; nothing where nothing was.

    Found over a network where the layout goes over one, and the other way round, if there is such; with as many
    threads, of a process alone. Between two numbers of workers a straight line over the logarithm of their number; else
    the nearest one's, growing with that.
    """
    found = [one for one in corrections if one.ways == ways]
    over_network = is_over_network(layout, ways, places)
    found = [one for one in found if one.over_network == over_network] or found
    if not found:
        return []
    if ways == (ALONE,):
        return [
            (min(found, key=lambda one: abs((one.threads or 1) - (layout.threads or one.threads or 1))), 1.0)
        ]
    size = size_of(layout, ways)
    at = math.log2(size)
    below = max((one for one in found if (one.workers or size) <= size), key=_log_workers, default=None)
    above = min((one for one in found if (one.workers or size) >= size), key=_log_workers, default=None)
    if below is None or above is None:
        nearest = below or above
        assert nearest is not None
        return [(nearest, at / _log_workers(nearest))]
    if below.workers == above.workers:
        return [(below, 1.0)]
    share = (at - _log_workers(below)) / (_log_workers(above) - _log_workers(below))
    return [(below, 1.0 - share), (above, share)]


def _log_workers(one: Correction) -> float:
    return math.log2(one.workers or 1)
