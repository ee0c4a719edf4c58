"""From a worker's gradients to its updated parameters: what that takes, with one copy of the parameters, with all, in
shards."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from paceline.plan.links import Placement
from paceline.plan.overlap import bucket_bytes, exposed_s
from paceline.plan.places import Places
from paceline.plan.profile import Costs, Profile
from paceline.plan.stages import Stage
from paceline.records import Layout

SHARED_MEMORY = "shared memory"
"""Name of the link within a host over which workers can have one copy of the parameters."""


def one_copy(profile: Profile, places: Places, layout: Layout) -> bool:
    """Whether the workers of a host have one copy of the parameters between them, of which each updates a share."""
    return (
        layout.dp_shard == 1
        and profile.shares_update
        and all(w.name == SHARED_MEMORY for w, _ in places.linked.links_of(0))
        and places.of(layout, "data").per_host > 1
    )


def updating(
    profile: Profile,
    places: Places,
    layout: Layout,
    costs: Costs,
    mine: Sequence[Stage],
    row: Callable[[], Sequence[Stage]],
    speed: float,
) -> dict[str, float]:
    """Seconds by term, of a worker with these stages.

    Args:
        speed: of its host.
        row: gives each block of the model as a stage of its own.
    """
    trained = sum(stage.trained_bytes for stage in mine)
    whole = sum(stage.parameter_bytes for stage in mine)
    update_s, add_s = costs.optimizer_s_per_byte / speed, costs.add_s_per_byte / speed
    n = layout.data_parallel
    if n == 1:
        return {"optimizer_s": trained * update_s, "fixed_s": costs.fixed_s}
    place = places.of(layout, "data")
    if one_copy(profile, places, layout):
        k = place.per_host
        across = Placement(hosts=place.hosts, per_host=1, beside=place.beside * k, used=place.used)
        added_s = trained * add_s + (k - 1) * trained / k * add_s
        reduce_s = places.seconds("all-reduce", across, trained / k)
        bucket = bucket_bytes(profile.device, over_network=place.hosts > 1, sharers=k)
        if bucket is not None and layout.pp == 1:
            # What is handed on to a third host waits for the end.
            early_s = reduce_s if place.hosts == 2 else reduce_s / 2
            reduce_s += exposed_s(_backwards(row), bucket, early_s) - early_s
        num_meetings = 2 if place.hosts == 1 else 3
        return {
            "gradients_s": added_s + reduce_s,
            "optimizer_s": trained / k * update_s,
            "fixed_s": costs.fixed_s + num_meetings * costs.meeting_s,
        }
    if layout.dp_shard == 1:
        reduce_s = places.seconds("all-reduce", place, trained)
        bucket = bucket_bytes(profile.device, over_network=place.hosts > 1)
        # Pipelines begin it when all backward passes have ended.
        if bucket is not None and layout.pp == 1:
            reduce_s = exposed_s(_backwards(row), bucket, reduce_s)
        return {
            "gradients_s": 2 * trained * add_s + reduce_s,
            "optimizer_s": trained * update_s,
            "fixed_s": costs.fixed_s,
        }
    shard, replicate = places.of(layout, "dp_shard"), places.of(layout, "dp_replicate")
    units = sum(stage.num_blocks for stage in mine)
    gathers = {1: 1, 2: 1, 3: 2 * layout.micro}[layout.zero_stage]
    reductions = 1 if layout.keeps_gradients else layout.micro
    gather_s = gathers * units * places.seconds("all-gather", shard, whole / units)
    reduce_s = reductions * units * places.seconds("reduce-scatter", shard, trained / units)
    return {
        "gather_s": gather_s,
        "gradients_s": 2 * trained * add_s * reductions
        + reduce_s
        + places.seconds("all-reduce", replicate, trained / layout.dp_shard),
        "optimizer_s": trained / layout.dp_shard * update_s,
        "fixed_s": costs.fixed_s,
    }


def _backwards(row: Callable[[], Sequence[Stage]]) -> list[tuple[float, float]]:
    """Of each block, in the order of the backward pass: its seconds, and bytes of gradients."""
    return [(block.input_s + block.weight_s, block.trained_bytes) for block in reversed(row())]
