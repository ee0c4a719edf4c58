"""Collectives of workers on several hosts: right, with as few bytes between hosts as is said, and never a hang.

Real processes. Their hosts are what the launcher's numbers say; hosts with a network of their own: test_two_hosts.py.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import time

import pytest
import torch
from groups import run_group

from paceline.comm import memory_map
from paceline.comm.group import Group
from paceline.comm.hierarchy import arrange
from paceline.comm.world import World, find_hosts
from paceline.errors import CollectiveError

pytestmark = pytest.mark.shared_memory

DTYPES = (torch.float32, torch.bfloat16, torch.int64)
LENGTHS = (1, 5, 4099, (1 << 18) + 1)
"""Of each worker's range: carried by one worker, by all, with a rest, and larger than a slot of shared memory."""
GRIDS = [(2, 2), (3, 2), (2, 3)]
"""Hosts, and workers on each."""
NEVER_S = 40.0
"""A time-out that a test does not reach."""


def everyone(world: World) -> Group:
    group = world.group(world.size)
    assert group is not None
    assert group.transport == ("shared memory + gloo" if world.transport == "auto" else "gloo")
    return group


def random(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (values * 1000).to(dtype)


def sum_as_said(tensors: list[torch.Tensor], per_host: int) -> torch.Tensor:
    """Within each host in the order of rank; then these sums in the order of hosts."""
    sums = []
    for begin in range(0, len(tensors), per_host):
        total = tensors[begin].clone()
        for tensor in tensors[begin + 1 : begin + per_host]:
            total += tensor
        sums.append(total)
    for other in sums[1:]:
        sums[0] += other
    return sums[0]


def collectives(world: World) -> list[str]:
    """What differs from the same written out in this process."""
    group, size = everyone(world), world.size
    wrong = []
    for dtype in DTYPES:
        for length in LENGTHS if dtype == torch.float32 else LENGTHS[:-1]:
            name = f"{length} × {dtype}"
            inputs = [random(rank, size * length, dtype) for rank in range(size)]
            wanted = sum_as_said(inputs, world.local_size)
            if not torch.equal(group.sum_(inputs[world.rank].clone(), "a test"), wanted):
                wrong.append(f"all-reduce of {size} × {name}")
            full = group.reduce_scatter_(inputs[world.rank].clone(), "a test")
            own = slice(world.rank * length, (world.rank + 1) * length)
            if not torch.equal(full[own], wanted[own]):
                wrong.append(f"reduce-scatter of {size} × {name}")
            gathered = group.gather(inputs[world.rank][:length], "a test")
            if not torch.equal(gathered, torch.stack([t[:length] for t in inputs])):
                wrong.append(f"all-gather of {name}")
            for source in (0, size - 1):
                copy = group.broadcast_(inputs[world.rank].clone(), "a test", source)
                if not torch.equal(copy, inputs[source]):
                    wrong.append(f"broadcast of {size} × {name} from {source}")
    flags = group.gather(torch.tensor([world.rank % 2 == 0]), "a test")
    if flags.view(-1).tolist() != [rank % 2 == 0 for rank in range(size)]:
        wrong.append("all-gather of bool")
    if float(group.sum_(torch.tensor(2.5), "a number")) != 2.5 * size or group.waited_s <= 0:
        wrong.append("all-reduce of a number")
    return wrong


@pytest.mark.parametrize(("num_hosts", "per_host"), GRIDS)
def test_results_are_exact_on_every_worker(num_hosts, per_host):
    size = num_hosts * per_host
    results = run_group(collectives, size, per_host=per_host, timeout_s=NEVER_S)
    assert results == {rank: [] for rank in range(size)}


def begin_in_other_orders(world: World) -> list[int]:
    """Which sums are wrong; three times, the second and third in the rooms of the first."""
    group, numbers = everyone(world), list(range(6))
    host, place = divmod(world.rank, world.local_size)
    wrong = []
    for step in range(3):
        of_hosts = [
            [random(100 * step + 10 * host + number, LENGTHS[2], torch.float32) for number in numbers]
            for host in range(world.size // world.local_size)
        ]
        own = [(place + 1) * tensor for tensor in of_hosts[host]]
        for at in numbers:
            number = numbers[(at * (-1) ** host + host) % len(numbers)]
            group.start_sum_between_hosts(own[number], "a test", number)
        group.sum_(torch.zeros(10_000), "something else on its way")
        group.finish_sums_between_hosts()
        for number in numbers:
            total = (place + 1) * of_hosts[0][number]
            for others in of_hosts[1:]:
                total += (place + 1) * others[number]
            if not torch.equal(own[number], total):
                wrong.append(number)
    return wrong


@pytest.mark.parametrize(("num_hosts", "per_host"), GRIDS)
def test_hosts_may_begin_sums_in_different_orders(num_hosts, per_host):
    size = num_hosts * per_host
    results = run_group(begin_in_other_orders, size, per_host=per_host, timeout_s=NEVER_S)
    assert results == {rank: [] for rank in range(size)}


def count_bytes(world: World, num_bytes: int) -> dict[str, int]:
    """What this worker sends between hosts; a difference, as groups talk while they are made."""
    hierarchy = everyone(world)._memory
    tensor = torch.zeros(num_bytes // 4)
    calls = {
        "all-reduce": lambda: hierarchy.sum_(tensor, "a test"),
        "all-gather": lambda: hierarchy.all_gather_(tensor, "a test"),
        "reduce-scatter": lambda: hierarchy.reduce_scatter_(tensor, "a test"),
        "broadcast": lambda: hierarchy.broadcast_(tensor, "a test", world.size - 1),
        "small": lambda: hierarchy.sum_(tensor[:1024], "a test"),
    }
    sent = {}
    for name, call in calls.items():
        before = hierarchy.network_bytes
        call()
        sent[name] = hierarchy.network_bytes - before
    return sent


@pytest.mark.parametrize(("num_hosts", "per_host"), GRIDS)
def test_a_worker_sends_no_more_than_is_said(num_hosts, per_host):
    """The lines of the docstring of `Hierarchy`."""
    h, k = num_hosts, per_host
    share = 24_000 // k
    results = run_group(count_bytes, h * k, share * k, per_host=k, timeout_s=NEVER_S)
    for rank, sent in results.items():
        is_source = rank // k == h - 1
        assert sent["all-reduce"] == (share if h == 2 else 2 * (h - 1) * share // h)
        assert sent["all-gather"] == sent["reduce-scatter"] == (h - 1) * share // h
        if h == 2:
            assert sent["broadcast"] == (share if is_source else 0)
        else:
            assert sent["broadcast"] == (2 * (h - 1) * share // h if is_source else (h - 2) * share // h)
        small = 4096 if h == 2 else 2 * (h - 1) * (1024 // h) * 4
        # 1024 numbers cannot be divided by three evenly.
        assert sent["small"] == (pytest.approx(small, abs=16) if rank % k == k - 1 else 0)


def talk_in_groups(world: World) -> dict[tuple[int, ...], tuple[str, str, float]]:
    """Of each group of this worker: what carries it, why not memory, and the sum of its ranks as it computes it."""
    found = {}
    for ranks in [(0, 1), (0, 3), (0, 2, 3, 5), (0, 1, 3), (0, 1, 2, 3, 4, 5)]:
        group = world.group_of(ranks, busy=6, mailbox=True)
        if group is not None:
            total = group.sum_(torch.full((3,), float(world.rank)), "a test")
            assert group.has_mailbox == (ranks == (0, 1))
            if group.rank < 2:  # a message goes its way, whatever carries the rest
                sending = group.start_send(torch.tensor([world.rank]), 1 - group.rank, "a test")
                received = group.receive_(torch.tensor([-1]), 1 - group.rank, "a test")
                sending.wait()
                assert int(received) == ranks[1 - group.rank]
            found[ranks] = group.transport, group.why_no_memory, float(total[0])
    return found


def test_each_group_is_carried_by_what_its_members_share():
    """Two hosts of three workers. Of two members on two hosts neither shares memory with anyone."""
    results = run_group(talk_in_groups, 6, per_host=3, timeout_s=NEVER_S)
    several = "they are on several hosts"
    assert results[0] == {
        (0, 1): ("shared memory", "", 1.0),
        (0, 3): ("gloo", several, 3.0),
        (0, 2, 3, 5): ("shared memory + gloo", "", 10.0),
        (0, 1, 3): ("gloo", f"{several}, more of them on some than on others", 4.0),
        (0, 1, 2, 3, 4, 5): ("shared memory + gloo", "", 15.0),
    }
    assert results[5] == {ranks: results[0][ranks] for ranks in results[0] if 5 in ranks}


def give_back(world: World) -> tuple[str, float]:
    group = everyone(world)
    group.sum_(torch.ones(3), "a test")
    group.close()
    return group.transport, float(group.sum_(torch.ones(3), "a test")[0])


def test_a_group_goes_on_through_gloo_when_its_memory_is_given_back():
    assert run_group(give_back, 4, per_host=2, timeout_s=NEVER_S) == dict.fromkeys(range(4), ("gloo", 4.0))


def without_memory_on_one_host(world: World) -> tuple[str, str, float]:
    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    if world.rank == 2:
        memory_map.os.posix_fallocate = refuse
    open_before = set(os.listdir("/proc/self/fd"))
    group = world.group(4)
    assert group is not None
    memory_is_open = [
        name
        for name in set(os.listdir("/proc/self/fd")) - open_before
        if "memfd:paceline" in os.readlink(f"/proc/self/fd/{name}")
    ]
    assert not memory_is_open
    return group.transport, group.why_no_memory, float(group.sum_(torch.ones(3), "a test")[0])


def test_where_one_host_cannot_all_go_without():
    reason = "on host 1: rank 0 cannot reserve shared memory: Cannot allocate memory"
    results = run_group(without_memory_on_one_host, 4, per_host=2, timeout_s=NEVER_S)
    assert results == dict.fromkeys(range(4), ("gloo", reason, 4.0))


def lose_rank_1(world: World, how: int) -> tuple[list[tuple[str, bool, str]], float]:
    """What this worker is told of the sum that rank 1 misses, and of what it tries next."""
    group = everyone(world)
    group.sum_(torch.zeros(10_000), "a test")
    if world.rank == 1:
        os.kill(os.getpid(), how)
    begin_s, told, waited_s = time.monotonic(), [], 0.0
    for what in ("the sum that rank 1 misses", "the next"):
        try:
            group.sum_(torch.zeros(10_000), what)
        except CollectiveError as error:
            told.append((error.operation, error.timed_out, error.cause))
            waited_s = waited_s or time.monotonic() - begin_s
    return told, waited_s


def test_a_death_is_noticed_within_a_second_by_who_waits_for_it():
    results = run_group(lose_rank_1, 4, signal.SIGKILL, per_host=2, timeout_s=4.0, lost=1)
    assert set(results) == {0, 2, 3}
    missed = "all-reduce of the sum that rank 1 misses (39.06 KiB, operation 2)"
    where = {0: "within its host", 2: "between hosts", 3: "between hosts"}
    for rank, ((first, second), waited_s) in results.items():
        operation, timed_out, cause = first
        assert operation == f"{missed} {where[rank]}"
        if rank == 2:  # it waits for rank 0, which has given up, and whose process this test lets live
            assert (timed_out, cause) == (True, "rank 0 did not answer within 4 s")
        else:
            assert waited_s < 1.0
            assert not timed_out
            assert cause.startswith("rank 1 has ended" if rank == 0 else "rank 1 is gone or its connection")
        operation, _, cause = second
        assert operation == "all-reduce of the next (39.06 KiB, operation 3)"
        assert cause.startswith(f"an earlier operation failed: rank {rank}: {missed}")


def test_a_silent_worker_is_named_by_who_waits_for_it_when_the_time_is_up():
    results = run_group(lose_rank_1, 4, signal.SIGSTOP, per_host=2, timeout_s=2.0, lost=1)
    for rank, missing in ((0, 1), (2, 0), (3, 1)):
        (first, _), waited_s = results[rank]
        _, timed_out, cause = first
        assert timed_out
        assert cause.startswith(f"rank {missing} did not answer within 2 s")
        assert 1.5 < waited_s < 6.0


def differ(world: World, rank: int) -> None:
    everyone(world).sum_(torch.zeros(2000 + 2 * (world.rank >= rank)), "a test")


def test_workers_of_a_host_that_call_different_things_are_told_so():
    operation, timed_out, cause = run_group(differ, 4, 3, per_host=2, timeout_s=2.0)[2]
    assert operation == "all-reduce of a test (7.812 KiB, operation 1) within its host"
    assert not timed_out
    assert cause == (
        "rank 2 called reduce-scatter of 1000 × float32, rank 3 reduce-scatter of 1001 × float32"
    )


def test_hosts_that_call_different_things_do_not_mix_them():
    """A message of another length is never received: the time-out ends it, of one that breaks off for the other."""
    results = run_group(differ, 4, 2, per_host=2, timeout_s=2.0)
    assert any(timed_out for _, timed_out, _ in results.values())
    for rank, (operation, timed_out, cause) in results.items():
        assert (
            operation
            == f"all-reduce of a test ({('7.812', '7.82')[rank > 1]} KiB, operation 1) between hosts"
        )
        words = "did not answer within 2 s" if timed_out else "is gone or its connection broke"
        assert cause.startswith(f"rank {(rank + 2) % 4} {words}")


@pytest.mark.parametrize(
    ("places", "hosts"),
    [
        ([(0, 1)], (0,)),
        ([(0, 2), (1, 2), (0, 2), (1, 2)], (0, 0, 2, 2)),
        ([(0, 1), (0, 3), (1, 3), (2, 3)], (0, 1, 1, 1)),
        ([(0, 1), (0, 1)], (0, 1)),
        ([(0, 2), (0, 2), (1, 2), (1, 2)], ()),  # one to each host by turns
        ([(0, 2), (1, 2), (0, 2)], ()),
        ([(0, 2), (1, 3), (2, 3)], ()),
        ([(0, 0)], ()),
    ],
)
def test_hosts_are_found_by_the_launchers_numbers(places, hosts):
    assert find_hosts(places) == hosts


def use_hosts_that_are_not_known(world: World) -> tuple[str, str, bool, float]:
    unknown = dataclasses.replace(world, hosts=(), groups={})
    group = unknown.group_of((0, 1), busy=2, mailbox=True)
    assert group is not None
    total = float(group.sum_(torch.ones(3), "a test")[0])
    return group.transport, group.why_no_memory, group.has_mailbox, total


def test_where_hosts_are_not_known_all_go_without():
    reason = "LOCAL_RANK and LOCAL_WORLD_SIZE of all workers do not tell who shares a host"
    assert run_group(use_hosts_that_are_not_known, 2) == dict.fromkeys((0, 1), ("gloo", reason, False, 2.0))


def test_a_grid_knows_who_is_where():
    grid, reason = arrange((1, 2, 5, 6, 8, 9), 3, (0, 0, 4, 4, 8, 8))
    assert reason == ""
    assert grid is not None
    assert (grid.num_hosts, grid.per_host, grid.host, grid.place) == (3, 2, 1, 1)
    assert (grid.ranks[grid.row], grid.others) == ((5, 6), [0, 2])
    assert [grid.ranks[grid.peer(host)] for host in range(3)] == [2, 6, 9]
