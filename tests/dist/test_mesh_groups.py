"""The groups of a mesh have the right members, talk, and stay when others are released. Real processes."""

from __future__ import annotations

from typing import Any

import pytest

import torch
from groups import run_group

from paceline.comm.mesh import COMBINATIONS, build_mesh, make_mesh
from paceline.comm.world import World
from paceline.records import Layout

pytestmark = pytest.mark.shared_memory


def use_all_groups(world: World, layout: Layout) -> dict[str, Any]:
    mesh = build_mesh(world, layout)
    assert mesh is not None
    found: dict[str, Any] = {
        "coordinates": tuple(mesh.coordinates[axis] for axis in ("pp", "dp_replicate", "tp"))
    }
    for name in COMBINATIONS:
        group = getattr(mesh, name)
        total = group.sum_(torch.tensor([float(world.rank)]), "a test")
        assert float(total) == sum(group.ranks)
        assert group.ranks[group.rank] == world.rank
        found[name] = group.ranks
    to = 1 - mesh.pipeline.rank
    mesh.pipeline.start_send(torch.tensor([world.rank]), to, "a test").wait()
    found["other stage"] = int(mesh.pipeline.receive_(torch.tensor([-1]), to, "a test"))
    found["one group for the same workers"] = mesh.replicate is mesh.data
    found["transports"] = {mesh.axis(axis).transport for axis in ("pp", "dp_replicate", "tp")}
    found["mailboxes"] = [name for name in COMBINATIONS if getattr(mesh, name).has_mailbox]
    assert mesh.waited_s >= mesh.pipeline.waited_s > 0
    return found


def test_eight_workers_of_three_axes():
    results = run_group(use_all_groups, 8, Layout(pp=2, dp_replicate=2, tp=2), timeout_s=40.0)
    assert [results[rank]["coordinates"] for rank in range(8)] == [
        (0, 0, 0), (0, 0, 1), (0, 1, 0), (0, 1, 1), (1, 0, 0), (1, 0, 1), (1, 1, 0), (1, 1, 1),
    ]  # fmt: skip
    assert results[5] == {
        "coordinates": (1, 0, 1),
        "everyone": tuple(range(8)),
        "pipeline": (1, 5),
        "replicate": (5, 7),
        "shard": (5,),
        "tensor": (4, 5),
        "data": (5, 7),
        "sums": (1, 3, 5, 7),
        "model": (0, 1, 4, 5),
        "other stage": 1,
        "one group for the same workers": True,
        "transports": {"shared memory"},
        "mailboxes": ["pipeline"],
    }


def take_a_layout_after_others(world: World) -> list[Any]:
    """As a run does: time layouts of several sizes, take one, release the rest."""
    everyone = world.group(3)
    assert everyone is not None
    first_two = world.group(2)
    mesh = make_mesh(world, Layout(pp=2))
    world.release_groups(but=2)
    found: list[Any] = [everyone.transport, None if first_two is None else first_two.transport]
    if mesh is not None:
        found += [mesh.pipeline is first_two, mesh.pipeline.has_mailbox, mesh.pipeline.transport]
        mesh.pipeline.start_send(torch.ones(3), 1 - world.rank, "a test").wait()
        found.append(float(mesh.pipeline.receive_(torch.zeros(3), 1 - world.rank, "a test").sum()))
    found.append(float(everyone.sum_(torch.ones(1), "a test")))
    sharded = make_mesh(world, Layout(dp_shard=3))
    world.release_groups(but=3)
    assert sharded is not None
    found.append(None if first_two is None else first_two.transport)
    return found


def test_what_the_mesh_uses_is_not_released():
    results = run_group(take_a_layout_after_others, 3)
    assert (
        results[0] == results[1] == ["gloo", "shared memory", True, True, "shared memory", 3.0, 3.0, "gloo"]
    )
    assert results[2] == ["gloo", None, 3.0, None]


def tensor_groups_of_the_first_ranks(world: World) -> tuple[tuple[int, ...], str]:
    mesh = make_mesh(world, Layout(dp_shard=2, tp=2))
    world.release_groups(but=4)
    assert mesh is not None
    return mesh.tensor.ranks, mesh.tensor.transport


def test_a_mesh_group_of_the_first_ranks_is_not_taken_for_a_left_over():
    results = run_group(tensor_groups_of_the_first_ranks, 4)
    assert results[0] == results[1] == ((0, 1), "shared memory")
    assert results[2] == results[3] == ((2, 3), "shared memory")
