"""The groups of workers that a layout makes: one for each axis, and for the products that are needed."""

from __future__ import annotations

import dataclasses
import itertools

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.records import AXES, Layout


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The groups that one worker of a layout belongs to. A group of one talks to nobody."""

    layout: Layout
    rank: int
    coordinates: dict[str, int]
    """The worker's place along each axis."""
    everyone: Group
    pipeline: Group
    """Workers that differ in `pp` alone; likewise below."""
    replicate: Group
    shard: Group
    tensor: Group
    data: Group
    """`dp_replicate × dp_shard`: the workers among which a micro-batch is split."""

    @property
    def waited_s(self) -> float:
        """Seconds that this worker has spent in collectives of its groups."""
        groups = {
            id(g): g
            for g in (self.everyone, self.pipeline, self.replicate, self.shard, self.tensor, self.data)
        }
        return sum(group.waited_s for group in groups.values())


_GROUPS = {
    "everyone": AXES,
    "pipeline": ("pp",),
    "replicate": ("dp_replicate",),
    "shard": ("dp_shard",),
    "tensor": ("tp",),
    "data": ("dp_replicate", "dp_shard"),
}


def build_mesh(world: World, layout: Layout) -> Mesh | None:
    """The mesh of the first `layout.workers` ranks; None on the others. A collective call of all ranks of the world."""
    sizes = [getattr(layout, axis) for axis in AXES]
    places = list(itertools.product(*map(range, sizes)))
    rank_of = {place: rank for rank, place in enumerate(places)}
    own = places[world.rank] if world.rank < len(places) else None
    groups: dict[str, Group] = {}
    for name, axes in _GROUPS.items():
        varying = [AXES.index(axis) for axis in axes]
        for members in _lines(places, varying):
            ranks = tuple(rank_of[place] for place in members)
            group = world.group_of(ranks)
            if own in members:
                assert group is not None
                groups[name] = group
    if own is None:
        return None
    return Mesh(layout, world.rank, dict(zip(AXES, own, strict=True)), **groups)


def make_mesh(world: World, layout: Layout) -> Mesh | None:
    """The mesh of `layout`, as `build_mesh`; where only the batch is split one group is all that is needed."""
    if layout.splits_model:
        return build_mesh(world, layout)
    group = world.group(layout.workers)
    return None if group is None else data_mesh(group, layout)


def data_mesh(group: Group, layout: Layout | None = None) -> Mesh:
    """The mesh of workers that each have the whole model, and split the batch."""
    alone = Group.alone(group.device)
    layout = layout or Layout(dp_replicate=group.size)
    coordinates = {axis: group.rank if axis == "dp_replicate" else 0 for axis in AXES}
    return Mesh(layout, group.rank, coordinates, group, alone, group, alone, alone, group)


def _lines(places: list[tuple[int, ...]], varying: list[int]) -> list[list[tuple[int, ...]]]:
    """The places that agree in all but the `varying` coordinates, together, in order."""
    lines: dict[tuple[int, ...], list[tuple[int, ...]]] = {}
    for place in places:
        key = tuple(c for axis, c in enumerate(place) if axis not in varying)
        lines.setdefault(key, []).append(place)
    return list(lines.values())
