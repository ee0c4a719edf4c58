"""Which ranks of a layout belong together."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline.comm.group import Group
from paceline.comm.mesh import COMBINATIONS, build_mesh, coordinates, data_mesh, members
from paceline.comm.world import World
from paceline.records import AXES, Layout

LAYOUT = Layout(pp=2, dp_replicate=2, tp=2)

sizes = st.integers(1, 3)
layouts = st.builds(Layout, pp=sizes, dp_replicate=sizes, dp_shard=sizes, tp=sizes)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("everyone", [(0, 1, 2, 3, 4, 5, 6, 7)]),
        ("pipeline", [(0, 4), (1, 5), (2, 6), (3, 7)]),
        ("replicate", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("shard", [(0,), (1,), (2,), (3,), (4,), (5,), (6,), (7,)]),
        ("tensor", [(0, 1), (2, 3), (4, 5), (6, 7)]),
        ("data", [(0, 2), (1, 3), (4, 6), (5, 7)]),
        ("sums", [(0, 2, 4, 6), (1, 3, 5, 7)]),
        ("model", [(0, 1, 4, 5), (2, 3, 6, 7)]),
    ],
)
def test_members_of_two_by_two_by_two(name, groups):
    assert members(LAYOUT, COMBINATIONS[name]) == groups


@given(layouts, st.sampled_from(sorted(COMBINATIONS)))
def test_every_rank_is_in_one_group_with_those_that_differ_in_its_axes_alone(layout, name):
    groups = members(layout, COMBINATIONS[name])
    assert sorted(rank for group in groups for rank in group) == list(range(layout.workers))
    fixed = [axis for axis in AXES if axis not in COMBINATIONS[name]]
    for group in groups:
        assert list(group) == sorted(group)
        places = [coordinates(layout, rank) for rank in group]
        assert len({tuple(place[axis] for axis in fixed) for place in places}) == 1
    assert len({tuple(coordinates(layout, group[0])[axis] for axis in fixed) for group in groups}) == len(
        groups
    )


@given(layouts)
def test_the_innermost_axis_counts_fastest(layout):
    for rank in range(layout.workers):
        place, number = coordinates(layout, rank), 0
        for axis in AXES:
            assert 0 <= place[axis] < getattr(layout, axis)
            number = number * getattr(layout, axis) + place[axis]
        assert number == rank


def lone_world() -> World:
    return World(0, 1, 0, 1, torch.device("cpu"), 1.0)


def test_a_mesh_of_one_worker_talks_to_nobody():
    mesh = build_mesh(lone_world(), Layout())
    assert mesh is not None
    assert {getattr(mesh, name).ranks for name in COMBINATIONS} == {(0,)}
    assert mesh.everyone is mesh.tensor
    assert mesh.waited_s == 0.0


def test_axes_by_name():
    two, device = Group(None, (0, 1), 1, torch.device("cpu"), 1.0), torch.device("cpu")
    mesh = data_mesh(two)
    assert (mesh.rank, mesh.coordinates["dp_replicate"]) == (1, 1)
    assert mesh.axis("dp_replicate") is two
    assert mesh.axis("dp_replicate", "dp_shard") is two
    assert mesh.axis("pp", "dp_replicate") is two
    assert mesh.axis("tp").size == 1
    assert mesh.axis("cp").ranks == (1,)
    assert mesh.tensor.device == device


def test_a_product_without_a_group_is_a_key_error():
    group = Group(None, tuple(range(8)), 0, torch.device("cpu"), 1.0)
    mesh = data_mesh(group, LAYOUT)
    with pytest.raises(KeyError, match="dp_replicate × tp"):
        mesh.axis("dp_replicate", "tp")
