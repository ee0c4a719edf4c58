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


def wire_of(world: World, ranks: tuple[int, ...], number: int) -> NcclWire:
    wire.nccl_link = Link
    return NcclWire(None, ranks, torch.device("cpu"), Patience(world.rank, world.timeout_s), number)


def send_around(world: World) -> list[list[float]]:
    """Workers that have made different numbers of process groups send to the next before they receive from the last."""
    if world.rank < 2:
        dist.new_group([0, 1], use_local_synchronization=True)
    received = []
    for ranks, number in (((0, 2), 0), ((0, 1, 2), 0), ((0, 1, 2), 1)):
        if world.rank not in ranks:
            continue
        place, size = ranks.index(world.rank), len(ranks)
        own = wire_of(world, ranks, number)
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
