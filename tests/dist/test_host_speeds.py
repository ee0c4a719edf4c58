"""By what a pipeline is cut: the planner's word, or else how fast its workers are, which is found out there."""

from __future__ import annotations

import time

import pytest
import torch
from groups import run_group

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.split.stages import CutBy
from paceline.train.cutting import cut_by

_ITSELF = torch.mm


def _late(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A worker that is slow, and says so of each product."""
    result = _ITSELF(one, other)
    time.sleep(0.04)
    return result


def _cut_by(world: World, layout: str, slow: tuple[int, ...], cuts: tuple[int, ...] = ()) -> CutBy:
    if cuts and world.rank == 0:
        world.known.cuts_of = lambda layout: cuts
    mesh = make_mesh(world, Layout.parse(layout))
    assert mesh is not None
    if world.rank in slow:
        torch.mm = _late
    elif slow:
        torch.mm = lambda one, other: (_ITSELF(one, other), time.sleep(0.02))[0]
    try:
        return cut_by(mesh, None)
    finally:
        torch.mm = _ITSELF


def test_rank_0_has_the_planners_word_and_nobody_measures():
    told = run_group(_cut_by, 4, "pp=2,dp_replicate=2", (3,), (0, 3, 4), per_host=1)
    assert told == {0: CutBy(cuts=(0, 3, 4)), **dict.fromkeys((1, 2, 3), CutBy())}


def test_where_nothing_is_known_of_several_hosts_they_are_measured():
    told = run_group(_cut_by, 4, "pp=2,dp_replicate=2", (3,), per_host=1)
    assert len(set(told.values())) == 1
    assert told[0].speeds == pytest.approx((1.0, 0.5), abs=0.1)
    assert told[0].room > 0


def test_workers_of_one_host_are_alike():
    assert {by.speeds for by in run_group(_cut_by, 2, "pp=2", (1,)).values()} == {()}
