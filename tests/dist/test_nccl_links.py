"""How workers on GPUs find each other to send messages, with gloo in the place of NCCL (through_host.py)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from groups import run_group
from through_host import Link

from paceline.comm import wire
from paceline.comm.pending import Patience
from paceline.comm.wire import NcclWire
from paceline.comm.world import World


def wire_of(world: World, ranks: tuple[int, ...], name: str) -> NcclWire:
    wire.nccl_link = Link
    return NcclWire(None, ranks, torch.device("cpu"), Patience(world.rank, world.timeout_s), name)


def send_around(world: World) -> list[list[float]]:
    """Workers that have made different numbers of process groups send to the next before they receive from the last."""
    if world.rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    received = []
    for ranks, wire_name in (((0, 2), "first"), ((0, 1, 2), "second"), ((0, 1, 2), "third")):
        if world.rank not in ranks:
            continue
        place, size = ranks.index(world.rank), len(ranks)
        own = wire_of(world, ranks, wire_name)
        own.open_ring()
        sent = [
            own.start_send(torch.full((3,), 10.0 * world.rank + channel), (place + 1) % size, "a test", channel)
            for channel in (1, 2)
        ]
        got = []
        for channel in (2, 1):
            tensor = torch.zeros(3)
            own.receive_(tensor, (place - 1) % size, "a test", channel)
            got.append(float(tensor[-1]))
        for one in sent:
            one.wait()
        own.close()
        received.append(got)
    return received


def test_links_are_named_alike_on_both_ends_and_open_without_waiting_in_a_circle():
    found = run_group(send_around, 3, transport="gloo")
    around = [[22.0, 21.0], [2.0, 1.0], [12.0, 11.0]]
    assert found == {0: [[22.0, 21.0], around[0], around[0]], 1: [around[1]] * 2, 2: [[2.0, 1.0], around[2], around[2]]}


def names(world: World) -> list[str]:
    """Of what carries messages, of groups of the same workers one after the other, and of one that was closed."""
    if world.rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    found = []
    for ranks in ((0, 1, 2), (0, 2)):
        for _ in range(2):
            with world.group_for_a_while(ranks, busy=3) as group:
                found.append(group.wire_name if group is not None else "")
        group = world.group_of(ranks, busy=3)
        found.append(group.wire_name if group is not None else "")
    return found


def test_no_two_groups_name_their_links_alike():
    found = run_group(names, 3, transport="gloo")
    assert found[0] == found[2]
    assert len(set(found[0])) == len(found[0]) == 6
    assert found[1][:3] == found[0][:3]
