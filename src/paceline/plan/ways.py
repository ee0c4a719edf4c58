"""The ways in which a layout splits a job."""

from __future__ import annotations

from paceline.plan.profile import DATA, GATHERED, PIPELINE, SHARDED, TENSOR
from paceline.records import Layout


def ways_of(layout: Layout) -> tuple[str, ...]:
    """The ways in which a layout splits a job, as `Profile.unexplained_s` counts them."""
    found = []
    if layout.dp_shard > 1:
        found.append(GATHERED if layout.zero_stage == 3 else SHARDED)
    elif layout.dp_replicate > 1:
        found.append(DATA)
    if layout.tp > 1:
        found.append(TENSOR)
    if layout.pp > 1:
        found.append(PIPELINE)
    return tuple(found)


def size_of(layout: Layout, way: str) -> int:
    """Among how many workers a layout splits in a way."""
    sizes = {DATA: layout.data_parallel, TENSOR: layout.tp, PIPELINE: layout.pp}
    return sizes.get(way, layout.dp_shard)
