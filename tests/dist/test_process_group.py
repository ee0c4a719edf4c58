"""The backend `shm` of torch.distributed: right, exact, never silent about what it cannot do. Real processes."""

from __future__ import annotations

import functools
import gc
import os
import threading
import time
import warnings

import pytest
import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional_collectives
from shm_groups import run_shm

import paceline.comm.process_group as shm
from paceline.comm import memory_map
from paceline.comm.memory_map import DTYPES
from paceline.comm.phases import SLOT_BYTES
from paceline.comm.reductions import REDUCTIONS, can_reduce
from paceline.errors import CollectiveError

pytestmark = pytest.mark.shared_memory

NAMES = {
    "sum": dist.ReduceOp.SUM,
    "average": dist.ReduceOp.AVG,
    "minimum": dist.ReduceOp.MIN,
    "maximum": dist.ReduceOp.MAX,
    "product": dist.ReduceOp.PRODUCT,
    "bitwise and": dist.ReduceOp.BAND,
    "bitwise or": dist.ReduceOp.BOR,
    "bitwise xor": dist.ReduceOp.BXOR,
}


LENGTHS = (7, 33_000)
IN_PIECES = (torch.float32, torch.bfloat16, torch.complex64)


@functools.cache
def values(rank: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Random numbers of one rank, of any type."""
    generator = torch.Generator().manual_seed(rank)
    if dtype.is_complex:
        return (
            torch.randn(numel, 2, generator=generator, dtype=torch.float64)
            .view(torch.complex128)
            .view(-1)
            .to(dtype)
        )
    if dtype.is_floating_point:
        return torch.randn(numel, generator=generator, dtype=torch.float64).to(dtype)
    most = 2 if dtype is torch.bool else 100
    return torch.randint(0, most, (numel,), generator=generator).to(dtype)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)


def one_process(tensors: list[torch.Tensor], name: str) -> torch.Tensor:
    """`((t0 + t1) + t2) + …`, written out."""
    combine = next(r for r in REDUCTIONS if r.name == name).combine
    result = functools.reduce(combine, tensors)
    return result / len(tensors) if name == "average" else result


def check_reductions(rank: int, size: int) -> tuple[int, list[str]]:
    wrong, num_checked = [], 0
    group = dist.group.WORLD
    for reduction in REDUCTIONS:
        for dtype in DTYPES:
            if not can_reduce(reduction, dtype):
                continue
            for numel in LENGTHS + (SLOT_BYTES // dtype.itemsize + 3,) * (dtype in IN_PIECES):
                num_checked += 1
                own = [values(r, numel, dtype) for r in range(size)]
                wanted = one_process(own, reduction.name)
                name = f"{reduction.name} {dtype} {numel}"
                options = dist.AllreduceOptions()
                options.reduceOp = NAMES[reduction.name]
                summed = own[rank].clone()
                # Below the checks of dist.all_reduce, which looks at complex numbers as pairs.
                group.allreduce([summed], options).wait()
                if not torch.equal(bits(summed), bits(wanted)):
                    wrong.append(f"all-reduce {name}")
                options = dist.ReduceScatterOptions()
                options.reduceOp = NAMES[reduction.name]
                out = torch.empty(numel, dtype=dtype)
                # Of every worker, part p is its numbers turned round by p places.
                parts = [own[rank].roll(p) for p in range(size)]
                group.reduce_scatter([out], [parts], options).wait()
                if not torch.equal(bits(out), bits(one_process([t.roll(rank) for t in own], reduction.name))):
                    wrong.append(f"reduce-scatter {name}")
                options = dist.ReduceOptions()
                options.reduceOp, options.rootRank = NAMES[reduction.name], size - 1
                kept = own[rank].clone()
                group.reduce([kept], options).wait()
                if not torch.equal(bits(kept), bits(wanted if rank == size - 1 else own[rank])):
                    wrong.append(f"reduce {name}")
    return num_checked, wrong


@pytest.mark.parametrize("size", [2, 3])
def test_every_reduction_of_every_type_has_the_bits_of_one_process(size):
    results = run_shm(check_reductions, size)
    num_checked = results[0][0]
    assert num_checked >= 2 * sum(can_reduce(r, d) for r in REDUCTIONS for d in DTYPES) > 150
    assert results == [(num_checked, [])] * size


def check_against_gloo(rank: int, size: int) -> list[str]:
    """Each collective of torch.distributed on shared memory and on gloo, with the same numbers."""
    groups = (dist.group.WORLD, dist.new_group(backend="gloo"))
    found = [collectives(rank, size, group) for group in groups]
    assert found[0].keys() == found[1].keys()
    return [name for name, tensor in found[0].items() if not torch.equal(bits(tensor), bits(found[1][name]))]


def collectives(rank: int, size: int, group: dist.ProcessGroup) -> dict[str, torch.Tensor]:
    found = {}
    for numel in (1, 1000, SLOT_BYTES // 4 * 2 + 5):
        own = values(rank, numel, torch.float32)

        def keep(name: str, *tensors: torch.Tensor, numel: int = numel) -> None:
            found[f"{name} {numel}"] = torch.cat([t.reshape(-1) for t in tensors])

        for source in range(size):
            keep(f"broadcast {source}", copy := own.clone())
            dist.broadcast(copy, source, group=group)
            keep(f"broadcast {source}", copy)
            outs = [torch.zeros_like(own) for _ in range(size)] if rank == source else None
            dist.gather(own, outs, dst=source, group=group)
            keep(f"gather {source}", *(outs or [own]))
            parts = [own + p for p in range(size)] if rank == source else None
            dist.scatter(copy, parts, src=source, group=group)
            keep(f"scatter {source}", copy)
        outs = [torch.zeros_like(own) for _ in range(size)]
        dist.all_gather(outs, own, group=group)
        keep("all-gather of a list", *outs)
        single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
        full = torch.zeros(size * numel)
        single(full, own, group=group)
        keep("all-gather", full)
        full = torch.zeros(size * numel)
        dist.all_to_all_single(full, own.repeat(size) + torch.arange(size * numel), group=group)
        keep("all-to-all", full)
    # Worker r sends r + p + 1 rows to worker p.
    sizes = [rank + p + 1 for p in range(size)]
    rows = torch.arange(3.0 * sum(sizes)).view(-1, 3) + 100 * rank
    out = torch.zeros_like(rows)
    dist.all_to_all_single(out, rows, sizes, sizes, group=group)
    found["all-to-all of uneven parts"] = out
    outs = [torch.zeros(4) for p in range(size)]
    dist.all_to_all(outs, [torch.arange(4.0) + 10 * rank + p for p in range(size)], group=group)
    found["all-to-all of lists"] = torch.cat(outs)
    many = [values(rank, n, torch.int64).clone() for n in (3, 50, 1)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dist.all_reduce_coalesced(many, group=group)
    found["coalesced all-reduce"] = torch.cat(many)
    objects: list[object] = [None] * size
    dist.all_gather_object(objects, {"rank": rank}, group=group)
    assert objects == [{"rank": r} for r in range(size)]
    dist.barrier(group=group)
    return found


@pytest.mark.parametrize("size", [2, 4])
def test_collectives_move_what_gloo_moves(size):
    assert run_shm(check_against_gloo, size) == [[]] * size


def gaps(rank: int, size: int) -> bool:
    """Tensors that do not lie end to end. gloo's broadcast writes beside the elements of such a tensor."""

    def column(number: float) -> torch.Tensor:
        return torch.full((SLOT_BYTES // 8, 3), float(number))[:, 1]

    dist.broadcast(tensor := column(rank), 1)
    right = [bool((tensor == 1).all())]
    dist.all_reduce(tensor := column(rank + 1))
    right.append(
        bool((tensor == 3).all())
        and bool(tensor.as_strided((6,), (1,), 2).tolist() == [rank + 1, rank + 1, 3] * 2)
    )
    table = torch.zeros(SLOT_BYTES // 8, 2)
    dist.all_gather(list(table.unbind(1)), column(rank))
    right.append(torch.equal(table, torch.tensor([0.0, 1.0]).expand_as(table)))
    dist.scatter(tensor := column(-1), [column(5), column(6)] if rank == 0 else None, 0)
    right.append(bool((tensor == 5 + rank).all()))
    dist.all_to_all(list(table.unbind(1)), [column(rank), column(rank + 10)])
    right.append(torch.equal(table, torch.tensor([0.0, 1.0]).expand_as(table) + 10 * rank))
    image = torch.full((2, 3, 4, 5), float(rank)).to(memory_format=torch.channels_last)
    dist.broadcast(image, 1)
    right.append(bool((image == 1).all()) and image.is_contiguous(memory_format=torch.channels_last))
    with torch.no_grad():
        dist.all_reduce(parameter := torch.nn.Parameter(torch.ones(3)))
    right.append(bool((parameter == 2).all()))
    return all(right)


def test_tensors_with_gaps_are_filled_and_nothing_beside_them():
    assert run_shm(gaps, 2) == [True, True]


def every_type(rank: int, size: int) -> list[str]:
    """Every type can be moved, if not added."""
    wrong = []
    for dtype in DTYPES:
        own = [values(r, 33, dtype) for r in range(size)]
        outs = [torch.empty_like(own[0]) for _ in own]
        dist.group.WORLD.allgather([outs], [own[rank]]).wait()
        if not all(torch.equal(bits(a), bits(b)) for a, b in zip(own, outs, strict=True)):
            wrong.append(str(dtype))
    return wrong


def test_every_type_travels():
    assert run_shm(every_type, 2) == [[], []]


def subgroups(rank: int, size: int) -> tuple[float, float]:
    sums = use_groups_of_a_mesh(rank, size)
    gc.collect()
    assert open_memory() == 0
    return sums


def use_groups_of_a_mesh(rank: int, size: int) -> tuple[float, float]:
    mesh = dist.init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    row = functional_collectives.all_reduce(torch.tensor([float(rank)]), "sum", mesh["columns"].get_group())
    column = functional_collectives.all_reduce(torch.tensor([float(rank)]), "sum", mesh["rows"].get_group())
    # In a group by itself, and one in another order of ranks.
    alone = [dist.new_group([r]) for r in range(size)][rank]
    dist.all_reduce(torch.ones(1), group=alone)
    pair = dist.new_group([3, 1])
    if rank in (1, 3):
        first = torch.tensor([float(rank)])
        dist.broadcast(first, src=3, group=pair)
        assert first.item() == 3
    with pytest.raises(CollectiveError, match=r"rank \d called all-reduce"):
        dist.all_reduce(torch.ones(1 + rank), group=mesh["rows"].get_group())
    dist.destroy_process_group(pair)
    dist.barrier()
    dist.destroy_process_group()
    return float(row), float(column)


def test_groups_of_a_mesh_and_leaving_in_good_order():
    results = run_shm(subgroups, 4)
    assert results == [(1, 2), (1, 4), (5, 2), (5, 4)]


def asynchronous(rank: int, size: int) -> list[bool]:
    tensor = torch.full((3,), float(rank + 1))
    work = dist.all_reduce(tensor, async_op=True)
    future = work.get_future()
    return [
        work.wait(),
        work.is_completed(),
        work.is_success(),
        work.exception() is None,
        work.result()[0] is tensor,
        bool((future.wait()[0] == 3).all()),
        bool((future.then(lambda f: f.value()[0] / 3).wait() == 1).all()),
        bool((functional_collectives.all_reduce(torch.ones(2), "avg", dist.group.WORLD) + 0 == 1).all()),
    ]


def test_asynchronous_works_answer_everything():
    assert run_shm(asynchronous, 2) == [[True] * 8] * 2


def mismatch(rank: int, size: int, kind: str) -> None:
    tensor = torch.zeros(8)
    if kind == "kind":
        dist.all_reduce(tensor) if rank else dist.broadcast(tensor, 0)
    elif kind == "operation":
        dist.all_reduce(tensor, dist.ReduceOp.MAX if rank else dist.ReduceOp.SUM)
    elif kind == "type":
        dist.all_reduce(tensor.double() if rank else tensor)
    elif kind == "length beyond the first piece":
        dist.all_reduce(torch.zeros(SLOT_BYTES // 2 + rank))
    elif kind == "root":
        dist.reduce(tensor, rank)
    elif kind == "empty":
        dist.all_reduce(tensor[: rank * 8])
    elif kind == "splits":
        dist.all_to_all_single(tensor, tensor.clone(), [4, 4], [4, 4] if rank else [3, 5])
    else:
        dist.all_gather([torch.zeros(3 + rank) for _ in range(2)], torch.zeros(3 + rank))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("kind", "rank 0 called broadcast of 8 × float32 from rank 0, rank 1 all-reduce of 8 × float32"),
        ("operation", "rank 0 called all-reduce of 8 × float32, rank 1 all-reduce (maximum) of 8 × float32"),
        ("type", "rank 0 called all-reduce of 8 × float32, rank 1 all-reduce of 8 × float64"),
        (
            "length beyond the first piece",
            "rank 0 called all-reduce of 524288 × float32, rank 1 all-reduce of 524289 × float32",
        ),
        ("root", "rank 0 called reduce of 8 × float32 to rank 0, rank 1 reduce of 8 × float32 to rank 1"),
        ("empty", "rank 0 called all-reduce of 0 × float32, rank 1 all-reduce of 8 × float32"),
        ("splits", "rank 0 sends 3 × float32 to rank 0, which receives 4 × float32"),
        ("shape", "rank 0 called all-gather of 3 × float32, rank 1 all-gather of 4 × float32"),
    ],
)
def test_calls_that_do_not_match_are_told_with_what_each_did_last(kind, words):
    first, second = run_shm(mismatch, 2, kind)
    assert words in first[1]
    (name, text) = second
    assert name == "CollectiveError"
    # The second sees the same, from its side.
    assert text.startswith("rank 1: ")
    assert "Next step: make " in text
    assert text.splitlines()[-3] == "What each rank did last:"
    assert all(line.startswith(f"  rank {r}: operation 1, ") for r, line in enumerate(text.splitlines()[-2:]))
    assert text.endswith("s ago, not left")


def wrong_arguments(rank: int, size: int) -> None:
    cases = [
        (
            lambda: dist.all_gather([torch.zeros(3)] * 2, torch.zeros(4)),
            "a list has 3 × torch.float32 where 4",
        ),
        (
            lambda: dist.group.WORLD.allgather([[torch.zeros(3)]], [torch.zeros(3)]),
            "a list has 1 tensors for the 2",
        ),
        (
            lambda: dist.all_to_all_single(torch.zeros(3), torch.zeros(3)),
            "a first dimension of 3 cannot be divided",
        ),
        (
            lambda: dist.group.WORLD._allgather_base(torch.zeros(5), torch.zeros(3)),
            "5 elements .* are not 2 × 3",
        ),
        (lambda: dist.group.WORLD.send([torch.zeros(3)], rank, 0), "sends to itself"),
    ]
    for call, words in cases:
        with pytest.raises(CollectiveError, match=words):
            call()
    # Nothing was sent: the group is as good as before.
    dist.barrier()


def test_wrong_arguments_are_told_and_do_no_harm():
    assert run_shm(wrong_arguments, 2) == [None, None]


def two_threads(rank: int, size: int) -> str:
    if rank == 1:
        time.sleep(1.0)
        dist.barrier()
        return ""
    thread = threading.Thread(target=dist.barrier)
    thread.start()
    while dist.group.WORLD.memory.phases._what is None:
        time.sleep(0.001)
    try:
        dist.all_reduce(torch.zeros(1))
    except CollectiveError as error:
        thread.join()
        return error.cause
    return "nothing was noticed"


def test_two_threads_in_one_group_are_told():
    assert run_shm(two_threads, 2)[0].startswith(
        "another thread of this process is inside a tensor in process group"
    )


def aborted(rank: int, size: int) -> tuple[str, float]:
    if rank == 0:
        dist.group.WORLD.abort()
    begin_s = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        dist.barrier()
    return caught.value.cause, time.monotonic() - begin_s


def test_an_abort_is_noticed_by_those_that_wait():
    (own, _), (theirs, waited_s) = run_shm(aborted, 2)
    assert own == "an earlier operation failed: the group was aborted"
    assert theirs == "rank 0 gave up in its operation 1"
    assert waited_s < 1


def elsewhere(rank: int, size: int) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        sparse = torch.eye(3)[rank : rank + 1].to_sparse()
        dist.all_reduce(sparse)
        assert torch.equal(sparse.to_dense(), torch.eye(3)[:1] + torch.eye(3)[1:2])
        dist.all_reduce(torch.eye(3).to_sparse())
        # gloo's own refusal.
        with pytest.raises((RuntimeError, ValueError)):
            dist.all_reduce(torch.ones(2, dtype=torch.int64), dist.ReduceOp.AVG)
    dist.destroy_process_group()
    return [str(t.message) for t in told if "shared memory" in str(t.message)]


def test_what_memory_cannot_carry_goes_through_gloo_and_is_said_once():
    for told in run_shm(elsewhere, 2):
        assert told == [
            "allreduce of a torch.sparse_coo tensor of torch.float32 on cpu, and calls like it, go through gloo "
            "instead of shared memory"
        ]


def open_memory() -> int:
    """How many descriptors of shared memory this process holds."""
    with os.scandir("/proc/self/fd") as entries:
        paths = [entry.path for entry in entries]
    return sum("memfd:paceline" in os.readlink(path) for path in paths if os.path.lexists(path))


def without_memory(rank: int, size: int, problem: str) -> tuple[list[str], float]:
    if problem == "full" and rank == 1:

        def refuse(*_: object) -> None:
            raise OSError(28, "No space left on device")

        memory_map.os.posix_fallocate = refuse
    before = open_memory()
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        if problem == "hosts":
            shm.meet.__globals__["_host"] = lambda: [f"host {rank}"]
        group = dist.new_group(backend="shm")
        tensor = torch.ones(1)
        dist.all_reduce(tensor, group=group)
        dist.all_reduce(tensor, group=group)
    assert isinstance(group, dist.ProcessGroup)
    assert not isinstance(group, shm.SharedMemoryGroup)
    # Of what was tried nothing stays open.
    assert open_memory() == before
    return [str(t.message) for t in told if "shared memory" in str(t.message)], tensor.item()


@pytest.mark.parametrize(
    ("problem", "words"),
    [
        ("full", "rank 1 cannot reserve shared memory: No space left on device"),
        ("hosts", "they are on several hosts"),
    ],
)
def test_where_memory_cannot_be_shared_the_group_is_gloos_and_says_so_once(problem, words):
    for told, total in run_shm(without_memory, 2, problem):
        assert total == 4
        assert len(told) == 1
        assert told[0].startswith("process group ")
        assert told[0].endswith(f" uses gloo instead of shared memory: {words}")


def records(rank: int, size: int) -> tuple[list[str], float]:
    for _ in range(20):
        dist.all_reduce(torch.zeros(4), dist.ReduceOp.MAX)
    dist.send(torch.zeros(2), 1, tag=3) if rank == 0 else dist.recv(torch.zeros(2), 0, tag=3)
    dist.barrier()
    told = [f"{r.number} {r.call} {r.left_s is not None}" for r in shm.records()[0]]
    with pytest.raises(TypeError, match="keeps no records"):
        shm.records(dist.new_group(backend="gloo"))
    recorder = dist.group.WORLD.memory.phases.recorder
    costs_s = []
    for _ in range(20):
        begin_s = time.perf_counter()
        for _ in range(500):
            recorder.leave(recorder.enter(1 << 62))
        costs_s.append((time.perf_counter() - begin_s) / 500)
    return told, min(costs_s)


def test_the_last_sixteen_operations_of_each_worker_can_be_had():
    results = run_shm(records, 2)
    told, cost_s = results[0]
    assert len(told) == 16
    assert told[:-2] == [f"{n} all-reduce (maximum) of 4 × float32 True" for n in range(7, 21)]
    assert told[-2] == "21 send of 2 × float32 to rank 1 True"
    assert told[-1].startswith("22 barrier ")
    assert cost_s < 2e-6


def test_registering_twice_does_nothing():
    shm.register_shm()
    shm.register_shm()
    assert dist.Backend.backend_list.count("shm") == 1
