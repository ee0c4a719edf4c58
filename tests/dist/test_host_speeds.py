"""How fast the workers of a pipeline are, for where it is cut: as the planner has found, or found out there."""

from __future__ import annotations

import time

import pytest
import torch
from groups import run_group

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.train.cutting import cut_by

_ITSELF = torch.mm


def _late(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A worker that is slow, and says so of each product."""
    result = _ITSELF(one, other)
    time.sleep(0.04)
    return result


def _cut_by(world: World, layout: str, slow: tuple[int, ...], known: list[float]) -> tuple[float, ...]:
    world.known.speeds = tuple(known)
    mesh = make_mesh(world, Layout.parse(layout))
    assert mesh is not None
    if world.rank in slow:
        torch.mm = _late
    elif slow:
        torch.mm = lambda one, other: (_ITSELF(one, other), time.sleep(0.02))[0]
    try:
        return cut_by(mesh, None).speeds
    finally:
        torch.mm = _ITSELF


def test_what_the_planner_has_measured_is_taken_of_the_slowest_worker_with_the_same_stages():
    told = run_group(_cut_by, 4, "pp=2,dp_replicate=2", (), [1.0, 0.9, 0.5, 0.6], per_host=1)
    assert set(told.values()) == {(0.9, 0.5)}


def test_where_nothing_is_known_of_several_hosts_they_are_measured():
    told = run_group(_cut_by, 4, "pp=2,dp_replicate=2", (3,), [], per_host=1)
    assert len(set(told.values())) == 1
    assert told[0] == pytest.approx((1.0, 0.5), abs=0.1)


def test_workers_of_one_host_are_alike():
    assert set(run_group(_cut_by, 2, "pp=2", (1,), []).values()) == {()}
