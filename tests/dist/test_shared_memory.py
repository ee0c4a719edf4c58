"""Collectives through shared memory: right, the same on every worker, and never a hang. Real processes."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from preloaded import CONTEXT

from paceline.comm import memory_map
from paceline.comm.memory_map import join_memory
from paceline.comm.reductions import AVG, MAX, SUM, reduce_into
from paceline.comm.shared_memory import SLOT_BYTES, SharedMemory, memory_bytes
from paceline.errors import CollectiveError
from paceline.measure.machine import usable_cores

pytestmark = pytest.mark.shared_memory

SLOT = SLOT_BYTES // 4
LENGTHS = (1, 5, 8191, SLOT, SLOT + 3, 2 * SLOT + 1)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
TIMEOUT_S = 2.0


def own_tensor(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (values * 1000).to(dtype)


def run_workers(function: Callable[..., Any], size: int, *arguments: Any) -> dict[int, Any]:
    """`function(memory, rank, size, *arguments)` in `size` processes; what each returned or raised."""
    manager = CONTEXT.Manager()
    barrier, told, results = manager.Barrier(size), manager.dict(), manager.dict()
    processes = [
        CONTEXT.Process(target=work, args=(function, rank, size, barrier, told, results, *arguments))
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + 100
    try:
        while any(p.is_alive() for p in processes) and len(results) < size:
            assert time.monotonic() < deadline_s, "a worker hangs"
            # Killed and stopped workers never report.
            if len(results) == size - 1 and function in (kill_one, stop_one):
                break
            time.sleep(0.02)
        return dict(results)
    finally:
        for process in processes:
            process.kill()
            process.join()
        manager.shutdown()


def work(function, rank, size, barrier, told, results, *arguments) -> None:
    torch.set_num_threads(1)

    def tell_all(value: Any, what: str) -> list[Any]:
        told[what, rank] = value
        barrier.wait(timeout=60)
        return [told[what, r] for r in range(size)]

    mapped, reason = join_memory(rank, size, size, (0,), memory_bytes(size), tell_all)
    assert mapped is not None, reason
    ranks, spins = tuple(range(size)), size <= len(usable_cores())
    memory = SharedMemory(mapped, ranks, TIMEOUT_S, spins=spins)
    try:
        results[rank] = function(memory, rank, size, *arguments)
    except CollectiveError as error:
        results[rank] = error.operation, error.timed_out, error.cause


def collectives(memory: SharedMemory, rank: int, size: int) -> dict[str, bool]:
    """Every collective on every length and type, against the same sum written out in this process."""
    right = {}
    for dtype in DTYPES:
        for length in LENGTHS:
            tensors = [own_tensor(r, length, dtype) for r in range(size)]
            summed = tensors[rank].clone()
            memory.sum_(summed, "a test")
            wanted = tensors[0].clone()
            for tensor in tensors[1:]:
                wanted += tensor
            rows = torch.zeros(size, length, dtype=dtype)
            rows[rank] = tensors[rank]
            memory.all_gather_(rows.view(-1), "a test")
            full = tensors[rank].repeat(size)
            memory.reduce_scatter_(full, "a test")
            copy = tensors[rank].clone()
            memory.broadcast_(copy, "a test", source=size - 1)
            right[f"sum {dtype} {length}"] = torch.equal(summed, wanted)
            right[f"gather {dtype} {length}"] = torch.equal(rows, torch.stack(tensors))
            right[f"broadcast {dtype} {length}"] = torch.equal(copy, tensors[-1])
            right[f"reduce-scatter {dtype} {length}"] = torch.equal(full.view(size, -1)[rank], wanted)
    return right


@pytest.mark.parametrize("size", [2, 3, 4])
def test_results_are_those_of_the_same_sum_in_one_process_bit_for_bit(size):
    results = run_workers(collectives, size)
    assert len(results) == size
    for right in results.values():
        assert len(right) == 4 * len(DTYPES) * len(LENGTHS)
        assert all(right.values()), [name for name, is_right in right.items() if not is_right]


def uneven_pace(memory: SharedMemory, rank: int, size: int, length: int) -> bool:
    """Workers that come early and late by turns: a slot must not be written while another still reads it."""
    right = True
    for number in range(300):
        if (number + rank) % 7 == 0:
            time.sleep(0.001)
        tensor = torch.full((length,), float(number * size + rank))
        memory.sum_(tensor, "a test")
        right &= bool((tensor == sum(number * size + r for r in range(size))).all())
    return right


@pytest.mark.parametrize(("size", "length"), [(2, 1000), (3, 1000), (3, 20_000), (4, 20_000)])
def test_workers_may_come_early_and_late(size, length):
    """Also where each adds up a shard, in two phases."""
    assert run_workers(uneven_pace, size, length) == dict.fromkeys(range(size), True)


def large_reductions(memory: SharedMemory, rank: int, size: int, spins: bool) -> list[str]:
    """Of more pieces than there are places for, by workers that come late by turns, one reduction after the other."""
    memory.phases.spins = spins
    wrong = []
    for number, reduction in enumerate((SUM, AVG, MAX)):
        tensors = [own_tensor(size * number + r, 11 * SLOT + 7, torch.float32) for r in range(size)]
        wanted = torch.empty_like(tensors[0])
        reduce_into(wanted, tensors, reduction)
        if number == rank:
            time.sleep(0.02)
        reduced = tensors[rank].clone()
        memory.all_reduce_(reduced, "a test", reduction)
        own, width = torch.empty(4 * SLOT + 3), 4 * SLOT + 3
        full = [own_tensor(r, size * width, torch.float32) for r in range(size)]
        memory.reduce_scatter_single(own, full[rank].clone(), "a test", reduction)
        wanted_own = torch.empty_like(own)
        reduce_into(wanted_own, [t.view(size, width)[rank] for t in full], reduction)
        if not torch.equal(reduced, wanted):
            wrong.append(f"all-reduce, {reduction.name}")
        if not torch.equal(own, wanted_own):
            wrong.append(f"reduce-scatter, {reduction.name}")
    return wrong


@pytest.mark.parametrize(("size", "spins"), [(3, True), (3, False), (4, False)])
def test_large_tensors_are_reduced_from_worker_to_worker(size, spins):
    assert run_workers(large_reductions, size, spins) == {rank: [] for rank in range(size)}


def wait_for_a_late_one(memory: SharedMemory, rank: int, size: int) -> tuple[float, float]:
    """Seconds, and seconds of processor time, of 20 waits for a worker that is 10 ms late each time."""
    begin_s, burnt_s = time.monotonic(), time.process_time()
    for _ in range(20):
        if rank == size - 1:
            time.sleep(0.01)
        memory.barrier("a test")
    return time.monotonic() - begin_s, time.process_time() - burnt_s


def test_those_that_wait_sleep_and_are_woken():
    """Who is not woken finds out by itself after 50 ms: 0.7 s instead of 0.2 s."""
    results = run_workers(wait_for_a_late_one, 3)
    assert set(results) == {0, 1, 2}
    for seconds, burnt_s in results.values():
        assert 0.2 <= seconds < 0.45
        assert burnt_s < 0.06


def mismatch(memory: SharedMemory, rank: int, size: int, kind: str) -> None:
    if kind == "length":
        memory.sum_(torch.zeros(8 + rank), "a test")
    elif kind == "source":
        memory.broadcast_(torch.zeros(8), "a test", source=rank)
    elif kind == "type":
        memory.sum_(torch.zeros(8, dtype=torch.float64 if rank else torch.float32), "a test")
    elif rank:
        memory.sum_(torch.zeros(8), "a test")
    else:
        memory.all_gather_(torch.zeros(16), "a test")


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("length", "rank 0 called all-reduce of 8 × float32, rank 1 all-reduce of 9 × float32"),
        ("type", "rank 0 called all-reduce of 8 × float32, rank 1 all-reduce of 8 × float64"),
        (
            "source",
            "rank 0 called broadcast of 8 × float32 from rank 0, rank 1 broadcast of 8 × float32 from rank 1",
        ),
        ("order", "rank 0 called all-gather of 8 × float32, rank 1 all-reduce of 8 × float32"),
    ],
)
def test_calls_that_do_not_match_are_reported_with_both_sides(kind, words):
    operation, timed_out, cause = run_workers(mismatch, 2, kind)[0]
    assert cause == words
    assert not timed_out
    assert operation == f"{words.split()[3]} of a test (operation 1)"


def use_after_a_mismatch(memory: SharedMemory, rank: int, size: int) -> None:
    with pytest.raises(CollectiveError):
        memory.sum_(torch.zeros(8 + rank), "a first test")
    memory.sum_(torch.zeros(8), "a second test")


def test_after_a_failure_nothing_is_exchanged_any_more():
    """A retry would meet the other worker's next operation, and add up what does not belong together."""
    for operation, _, cause in run_workers(use_after_a_mismatch, 2).values():
        assert "of a second test" in operation
        assert cause.startswith("an earlier operation failed: rank")


def kill_one(memory: SharedMemory, rank: int, size: int) -> tuple[str, bool, str, float]:
    memory.sum_(torch.zeros(8), "a test")
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    begin_s = time.monotonic()
    try:
        memory.sum_(torch.zeros(8), "the sum that rank 1 misses")
    except CollectiveError as error:
        return error.operation, error.timed_out, error.cause, time.monotonic() - begin_s
    raise AssertionError("the death of a worker was not noticed")


def test_a_death_is_noticed_within_a_second():
    results = run_workers(kill_one, 3)
    assert set(results) == {0, 2}
    for operation, timed_out, cause, seconds in results.values():
        assert operation == "all-reduce of the sum that rank 1 misses (operation 2)"
        assert cause == "rank 1 has ended"
        assert not timed_out
        assert seconds < 1.0


def stop_one(memory: SharedMemory, rank: int, size: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    memory.sum_(torch.zeros(8), "the sum that rank 1 misses")


def test_a_silent_worker_is_named_when_the_time_is_up():
    results = run_workers(stop_one, 2)
    assert set(results) == {0}
    operation, timed_out, cause = results[0]
    assert operation == "all-reduce of the sum that rank 1 misses (operation 1)"
    assert timed_out
    assert cause.startswith("rank 1 did not answer within 2 s: its process (PID ")
    assert cause.endswith(") is stopped (state T); `kill -CONT` would continue it")


def alike(value: Any, what: str) -> list[Any]:
    """What rank 0 hears where rank 1 says the same."""
    return [value, value]


def test_hosts_apart_share_no_memory():
    memory, reason = join_memory(0, 2, 1, (0,), 4096, alike)
    assert memory is None
    assert reason == "they are on several hosts"


def test_memory_that_cannot_be_reserved_is_said(monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(12, "Cannot allocate memory")

    monkeypatch.setattr(memory_map.os, "posix_fallocate", refuse)
    memory, reason = join_memory(0, 2, 2, (0,), 4096, alike)
    assert memory is None
    assert reason == "rank 0 cannot reserve shared memory: Cannot allocate memory"


@pytest.mark.parametrize("name", ["memfd_create", "pidfd_open"])
def test_a_python_without_the_calls_goes_on_without(name, monkeypatch):
    monkeypatch.delattr(memory_map.os, name)
    memory, reason = join_memory(0, 2, 2, (0,), 4096, alike)
    assert memory is None
    assert reason == f"this Python was built without os.{name}"


def test_where_one_cannot_all_go_without_and_nothing_stays_open():
    def told(value: Any, what: str) -> list[Any]:
        return [value, value if isinstance(value, dict) else "rank 1 cannot map rank 0's memory"]

    before = set(os.listdir("/proc/self/fd"))
    memory, reason = join_memory(0, 2, 2, (0,), 4096, told)
    assert memory is None
    assert reason == "rank 1 cannot map rank 0's memory"
    assert set(os.listdir("/proc/self/fd")) == before


def test_the_memory_of_another_process_is_not_taken(tmp_path):
    wrong = tmp_path / "memory"
    wrong.write_bytes(bytes(8192))
    with pytest.raises(OSError, match="is it on another host"):
        memory_map._map(wrong, 8192, b"x" * 16)
