"""The groups of workers that a layout makes: one for each axis, and for the products that are needed."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.records import AXES, Layout

COMBINATIONS = {
    "everyone": AXES,
    "pipeline": ("pp",),
    "replicate": ("dp_replicate",),
    "shard": ("dp_shard",),
    "tensor": ("tp",),
    "data": ("dp_replicate", "dp_shard"),
    "sums": ("pp", "dp_replicate", "dp_shard"),
    "model": ("pp", "tp"),
}
"""The axes along which the members of each of a mesh's groups differ."""


@dataclasses.dataclass(frozen=True)
class Mesh:
    """The groups that one worker of a layout belongs to. A group of one talks to nobody.

    Groups of the same workers are the same object. Memory shared on a host, for each worker: 2 MiB for each
    group of several that it is in, which with all axes in use is 8 groups and 16 MiB (8 workers: 128 MiB); and in a
    pipeline 32 KiB for each of its workers, plus the messages under way.
    """

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
    sums: Group
    """All that differ in `tp` not at all."""
    model: Group
    """`pp × tp`: the workers that have one model between them."""
    cuts: tuple[int, ...] = ()
    """On rank 0: where the planner cuts the pipeline, as `Forecaster.cuts_of`. Empty: not known."""

    def axis(self, *axes: str) -> Group:
        """The group of the workers that differ from this one in these axes only, outermost first.

        Axes of size one make no difference. Groups are made for the products in `COMBINATIONS`; for another it is
        a `KeyError`.
        """
        wanted = self._longer_than_one(axes)
        for name, combination in COMBINATIONS.items():
            if self._longer_than_one(combination) == wanted:
                group: Group = getattr(self, name)
                return group
        if not wanted:
            return Group.alone(self.everyone.device, self.rank)
        raise KeyError(f"no group of {' × '.join(axes)}")

    @property
    def waited_s(self) -> float:
        """Seconds that this worker has spent in operations of its groups."""
        groups: set[Group] = {getattr(self, name) for name in COMBINATIONS}
        return sum(group.waited_s for group in groups)

    def _longer_than_one(self, axes: tuple[str, ...]) -> set[str]:
        return {axis for axis in axes if getattr(self.layout, axis) > 1}


def build_mesh(world: World, layout: Layout) -> Mesh | None:
    """The mesh of the first `layout.workers` ranks; None on the others. A collective call of all ranks of the world.

    Rank r is the r-th place of the mesh, row by row with the outermost axis first.
    """
    groups: dict[str, Any] = {}
    world.in_use.clear()
    for name, axes in COMBINATIONS.items():
        for ranks in members(layout, axes):
            world.in_use.add(ranks)
            group = world.group_of(ranks, mailbox=name == "pipeline", busy=layout.workers)
            if group is not None:
                groups[name] = group
    if world.rank >= layout.workers:
        return None
    cuts_of = world.known.cuts_of
    cuts = tuple(cuts_of(layout)) if layout.pp > 1 and cuts_of is not None else ()
    return Mesh(layout, world.rank, coordinates(layout, world.rank), **groups, cuts=cuts)


def make_mesh(world: World, layout: Layout) -> Mesh | None:
    """The mesh of `layout`, as `build_mesh`; where only the batch is split one group is all that is needed."""
    if layout.splits_model:
        return build_mesh(world, layout)
    world.in_use.clear()
    group = world.group(layout.workers)
    return None if group is None else data_mesh(group, layout)


def data_mesh(group: Group, layout: Layout | None = None) -> Mesh:
    """The mesh of workers that each have the whole model, and split the batch."""
    alone = Group.alone(group.device, group.ranks[group.rank])
    layout = layout or Layout(dp_replicate=group.size)
    groups: dict[str, Any] = dict.fromkeys(COMBINATIONS, alone)
    groups.update(everyone=group, replicate=group, data=group, sums=group)
    return Mesh(layout, group.rank, coordinates(layout, group.rank), **groups)


def tensor_mesh(mesh: Mesh) -> Mesh:
    """Of the workers that divide blocks with this one, as if there were no others."""
    group = mesh.tensor
    groups: dict[str, Any] = dict.fromkeys(COMBINATIONS, Group.alone(group.device, mesh.rank))
    groups.update(everyone=group, tensor=group, model=group)
    layout = Layout(tp=group.size, threads=mesh.layout.threads)
    return Mesh(layout, group.rank, coordinates(layout, group.rank), **groups)


def coordinates(layout: Layout, rank: int) -> dict[str, int]:
    """The place of a rank along each axis."""
    place = {}
    for axis in reversed(AXES):
        rank, place[axis] = divmod(rank, getattr(layout, axis))
    return {axis: place[axis] for axis in AXES}


def members(layout: Layout, axes: tuple[str, ...]) -> list[tuple[int, ...]]:
    """The ranks that agree in all axes but these, together, each in the order of the mesh."""
    lines: dict[tuple[int, ...], list[int]] = {}
    places = itertools.product(*(range(getattr(layout, axis)) for axis in AXES))
    for rank, place in enumerate(places):
        key = tuple(at for axis, at in zip(AXES, place, strict=True) if axis not in axes)
        lines.setdefault(key, []).append(rank)
    return [tuple(line) for line in lines.values()]
