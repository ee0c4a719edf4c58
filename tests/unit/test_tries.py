"""Which layouts are tried while a job is measured."""

from __future__ import annotations

import pytest

from paceline.plan.tries import layouts_to_try, sizes_divided
from paceline.plan.ways import ways_of
from paceline.records import Cluster, Host


def cluster(*workers: int) -> Cluster:
    common = {"device": "cpu", "device_name": "a processor", "memory_bytes": 1 << 34}
    hosts = [Host(name=f"host{n}", workers=w, cores=w, **common) for n, w in enumerate(workers)]
    return Cluster(hosts=tuple(hosts))


def tried(*workers: int, batch_size: int = 64, can_divide: bool = False):
    hosts = cluster(*workers)
    return layouts_to_try(batch_size, hosts, 1, divided=sizes_divided(hosts) if can_divide else ())


def test_a_single_worker_tries_nothing():
    assert tried(1) == []


@pytest.mark.parametrize("workers", [(2,), (1, 1), (4,), (1, 1, 1, 1), (2, 2), (4, 4)])
def test_each_way_is_tried_and_two_together_where_that_is_possible(workers):
    groups = tried(*workers, can_divide=True)
    layouts = [layout for group in groups for layout in group]
    ways = {ways_of(layout) for layout in layouts}
    assert {("data",), ("sharded",), ("gathered",), ("pipeline",), ("tensor",)} <= ways
    assert any(len(some) > 1 for some in ways) == (sum(workers) >= 4)
    assert all(layout.threads == 1 for layout in layouts if layout.workers > 1)
    alone = {layout.threads for layout in layouts if layout.workers == 1}
    assert alone == {1, workers[0]}
    assert len(set(layouts)) == len(layouts)
    assert max(layout.workers for layout in layouts) == sum(workers)
    for group in groups:
        assert len({(x.workers, ways_of(x), x.schedule, x.threads) for x in group}) == 1
        assert len({x.micro for x in group}) == 1 or all(x.pp == 1 for x in group)
        assert [x.micro for x in group] == sorted(x.micro for x in group)


def test_several_micro_batches_tell_what_each_pays():
    layouts = [x for group in tried(2, can_divide=True) for x in group]
    for way in ("data", "sharded", "gathered", "tensor", "pipeline"):
        assert len({x.micro for x in layouts if ways_of(x) == (way,)}) == 2
    assert {x.schedule for x in layouts if x.pp > 1} == {"1f1b", "zb-h1"}


@pytest.mark.parametrize("batch_size", [1, 2, 3, 6])
def test_what_the_batch_does_not_allow_is_not_tried(batch_size):
    for group in tried(2, 2, batch_size=batch_size, can_divide=True):
        for layout in group:
            layout.check_batch(batch_size)


@pytest.mark.parametrize(
    ("workers", "batch_size", "expected"),
    [(8, 64, {8, 32}), (8, 24, {8, 24}), (8, 10, {10}), (5, 24, {6, 12}), (3, 64, {4, 8}), (8, 4, set())],
)
def test_pipelines_get_the_micro_batches_that_the_batch_allows(workers, batch_size, expected):
    layouts = [x for group in tried(*[1] * workers, batch_size=batch_size) for x in group]
    whole = [x for x in layouts if ways_of(x) == ("pipeline",) and x.workers == workers]
    assert {x.micro for x in whole if x.schedule == "1f1b"} == expected
    assert {x.micro for x in whole if x.schedule == "zb-h1"} == expected


def test_over_several_hosts_tensor_parallelism_stays_within_one():
    layouts = [x for group in tried(2, 2, can_divide=True) for x in group]
    assert max(x.tp for x in layouts) == 2
    assert any(x.tp == 2 and x.pp == 2 for x in layouts)
    assert not any(x.tp > 1 for group in tried(2, 2) for x in group)


@pytest.mark.parametrize(("hosts", "expected"), [(2, 2), (3, 3), (4, 2), (8, 2)])
def test_over_hosts_of_one_worker_each_few_divide_blocks(hosts, expected):
    layouts = [x for group in tried(*[1] * hosts, can_divide=True) for x in group]
    assert {x.tp for x in layouts} == {1, expected}
    assert {x.micro for x in layouts if x.tp > 1} == {1, 2}


@pytest.mark.parametrize(
    ("workers", "expected"),
    [
        ((1,), []),
        ((2,), [2]),
        ((8,), [8, 4, 2]),
        ((6, 6), [6, 3]),
        ((1, 1, 1), [3]),
        ((1,) * 4, [2]),
    ],
)
def test_blocks_are_divided_among_a_host_and_its_halves(workers, expected):
    assert sizes_divided(cluster(*workers)) == expected


def test_each_division_that_is_possible_is_tried_by_all_of_the_host():
    hosts = cluster(8, 8)
    layouts = [x for group in layouts_to_try(64, hosts, 1, divided=[4, 2]) for x in group if x.tp > 1]
    found = {(x.tp, x.dp_replicate, x.micro) for x in layouts}
    assert found == {(4, 2, 1), (4, 2, 2), (2, 4, 1), (2, 4, 2)}


@pytest.mark.parametrize("hosts", [2, 3, 4, 8])
def test_of_many_hosts_of_one_worker_two_are_tried_by_themselves(hosts):
    layouts = [x for group in tried(*[1] * hosts, batch_size=96) for x in group if x.workers > 1]
    assert {x.workers for x in layouts} == {2: {2}, 3: {3}, 4: {2, 4}, 8: {2, 4, 8}}[hosts]
    for way in ("data", "sharded", "gathered", "pipeline"):
        of_all = [x for x in layouts if ways_of(x) == (way,) and x.workers == hosts]
        assert len({x.micro for x in of_all}) == 2
    assert not any(x.workers == 2 for group in tried(4, 4) for x in group)


@pytest.mark.parametrize(
    ("workers", "expected"), [((1,) * 8, 4), ((1,) * 20, 4), ((8,) * 4, 16), ((8,) * 8, 16), ((8,) * 128, 64)]
)
def test_some_between_few_and_many_workers_are_tried(workers, expected):
    few, everyone = max(2, workers[0]), sum(workers)
    layouts = [x for group in tried(*workers, batch_size=7680) for x in group if few < x.workers < everyone]
    assert {x.workers for x in layouts} == {expected}
    assert {(ways_of(x), x.micro) for x in layouts} == {(("data",), 1), (("data",), 2)}


@pytest.mark.parametrize("workers", [(8,), (4, 4), (1, 1, 1, 1), (8, 8, 8)])
def test_where_all_are_few_times_the_few_none_between_are_tried(workers):
    sizes = {x.workers for group in tried(*workers, batch_size=96) for x in group}
    assert sizes == {1, max(2, workers[0]), sum(workers)}


def test_of_pipelines_beside_another_way_several_are_tried():
    layouts = [x for group in tried(2, 2, can_divide=True) for x in group if x.pp == 2]
    for beside in ("dp_replicate", "tp"):
        found = {(x.micro, x.schedule) for x in layouts if getattr(x, beside) == 2}
        assert found == {(2, "1f1b"), (8, "1f1b"), (2, "zb-h1"), (8, "zb-h1")}
    assert {x.micro for x in layouts if x.dp_shard == 2} == {2, 8}


def test_hosts_that_cannot_be_paired_are_not():
    assert all(len(ways_of(x)) == 1 for group in tried(2, 1) for x in group)
