"""What stages of a pipeline send each other: how long it takes, and how long the way is taken by it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from paceline.plan.links import STREAM, Placement
from paceline.plan.places import Places
from paceline.plan.stages import Stage
from paceline.plan.timeline import Hop
from paceline.records import Layout

_WITHIN, _BETWEEN = 0, 1
"""Media of a worker: its host's, and its host's cable."""


@dataclasses.dataclass(frozen=True)
class Sending:
    """Between the stages of a layout."""

    hops: tuple[Hop, ...] = ()
    """Of each cut."""
    behind_s: float = 0.0
    """Pipelines that share a cable send one after the other: by so much the last is behind the first."""


def sending(places: Places, layout: Layout, stages: Sequence[Stage], worker_of: Sequence[int]) -> Sending:
    """What the cuts between `stages` cost.

    Workers that differ in tensor parallelism send at the same time and wait for each other afterwards, so that each
    message takes as long as all of theirs. Pipelines that differ in data wait for each other at the end of a step
    only: of those that share a cable, a message waits for those of the others, and once the first have waited they
    come at different times.

    Args:
        worker_of: the worker, along the pipeline, of each stage.
    """
    place = places.of(layout, "pp")
    inner = layout.workers // layout.pp
    together = min(layout.tp, place.beside)
    host_of = places.host_of
    mine = Placement(hosts=2, per_host=1, beside=together, used=place.used)
    everyone = dataclasses.replace(mine, beside=place.beside)
    neighbours = Placement(hosts=1, per_host=2, used=place.used)

    def hop_of(num_bytes: float, crosses: bool) -> Hop:
        if not crosses:
            there_s, busy_s = (places.seconds(kind, neighbours, num_bytes) for kind in ("message", STREAM))
            return Hop(there_s, busy_s, _WITHIN)
        there_s = places.seconds("message", mine, num_bytes)
        return Hop(there_s, places.seconds(STREAM, everyone, num_bytes), _BETWEEN)

    hops, behind_s = [], 0.0
    known: dict[tuple[float, bool], Hop] = {}
    for cut, stage in enumerate(stages[:-1]):
        here, there = worker_of[cut], worker_of[cut + 1]
        if here == there:
            hops.append(Hop())
            continue
        crosses = place.hosts > 1 and any(
            host_of(here * inner + at) != host_of(there * inner + at) for at in (0, inner - 1)
        )
        key = stage.output_bytes, crosses
        if key not in known:
            # Most models send the same over every cut.
            known[key] = hop_of(*key)
        hops.append(known[key])
        if crosses:
            behind_s = max(behind_s, known[key].busy_s * (1 - together / place.beside))
    return Sending(tuple(hops), behind_s)
