"""What fits into memory: layouts by themselves, and layouts that are timed by turns, whose models are all there."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.room import memory_margin, room_bytes
from paceline.records import Layout


def why_not(forecaster: Forecaster, layout: Layout) -> str:
    """Why a layout cannot be timed: what a worker would need, and what there is, where that is less; else empty.

    There is what `search` lets it have, less what the workers hold that it leaves out: they wait meanwhile.
    """
    linked = forecaster.linked
    try:
        memory = forecaster.forecast(layout, apart=False).memory
    except LayoutError as error:
        return error.what
    room = room_bytes(linked, layout)
    here = min(layout.workers, linked.per_host)
    if linked.cluster.device == "cpu":
        room -= (linked.per_host - here) * (memory.base + _loaded_bytes(forecaster, layout)) // here
    needed = forecaster.needed_bytes(layout) + _loaded_bytes(forecaster, layout)
    if needed <= room:
        return ""
    return (
        f"{layout} needs {needed / 2**20:,.0f} MiB a worker, and there are {room / 2**20:,.0f} MiB "
        f"({memory_margin(linked):.0%} left free)"
    )


def by_turns(forecaster: Forecaster, layouts: Sequence[Layout]) -> list[list[Layout]]:
    """The layouts in groups, in their order, whose models can all be in memory while they are timed by turns.

    Layouts that differ in their threads alone have one model.
    """
    linked = forecaster.linked
    # As if all workers were at work: whoever has the fewest layouts could have more.
    room = linked.worker_bytes(linked.cluster.workers) * (1 - memory_margin(linked))
    groups: list[list[Layout]] = []
    held: dict[Layout, float] = {}
    for layout in layouts:
        memory = forecaster.forecast(layout, apart=False).memory
        share = 1.0
        if linked.cluster.device == "cpu":
            # Of the memory of a host, in which other workers have nothing of it.
            share = min(layout.workers, linked.per_host) / linked.per_host
        key = layout.model_copy(update={"threads": None})
        more = {key: (memory.own - memory.base) * share}
        base = memory.base + _loaded_bytes(forecaster, layout)
        if not groups or base + sum((held | more).values()) > room:
            groups.append([])
            held = {}
        held |= more
        groups[-1].append(layout)
    return groups


def _loaded_bytes(forecaster: Forecaster, layout: Layout) -> int:
    """What workers hold in addition that have measured: the code that splits models, where a layout does without."""
    return 0 if layout.splits_model else forecaster.profile.splitting_bytes
