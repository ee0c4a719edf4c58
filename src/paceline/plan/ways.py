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


def correction_of(
    corrections: Sequence[Correction], layout: Layout, ways: tuple[str, ...], places: Places
) -> tuple[Correction, float] | None:
    """What was found of splitting so, and by what to multiply it; None: nothing was.

    Of several, one that was found over a network where the layout goes over one, and the other way round; of these the
    one of the nearest number of workers, or of threads of a process alone.
    """
    size, over_network = size_of(layout, ways), is_over_network(layout, ways, places)

    def distance(one: Correction) -> tuple[bool, float, int]:
        threads = 0 if one.threads is None else abs(one.threads - (layout.threads or one.threads))
        return one.over_network != over_network, abs(math.log2(size / (one.workers or size))), threads

    found = min((one for one in corrections if one.ways == ways), key=distance, default=None)
    if found is None:
        return None
    return found, 1.0 if found.workers is None else math.log2(size) / math.log2(found.workers)
