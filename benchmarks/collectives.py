"""How long collectives take on gloo and on the backend `shm`, and what training makes of it.

    python benchmarks/collectives.py [--ranks 2 4 8] [--training] [--out FILE.md]

Both backends are groups of the same processes and take turns in every round, so that both see the machine in the same
state. A number is the median over the rounds, with the middle half in brackets. Each worker computes with one thread.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import collectives_training
import torch
import torch.distributed as dist
import torch.multiprocessing as multiprocessing

import paceline.comm.process_group as shm
from paceline.comm import copying
from paceline.measure.machine import usable_cores

SIZES = (4, 64, 1 << 10, 16 << 10, 64 << 10, 1 << 20, 32 << 20, 128 << 20)
"""Bytes of the whole tensor on one rank: of what is reduced, and of what has been gathered."""
KINDS = ("all-reduce", "all-gather", "reduce-scatter", "broadcast", "all-to-all")
BACKENDS = ("gloo", "shm")
TURN_S = 0.05
"""About how long a backend's turn is."""
LATE_S = 0.05
WRITTEN_BYTES = 1 << 20
WRITINGS = 51

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclasses.dataclass(frozen=True)
class Spread:
    """Of one quantity over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        low, median, high = statistics.quantiles(values, n=4)
        return cls(median, low, high)

    def __str__(self) -> str:
        return f"{duration(self.median)} [{duration(self.low)}–{duration(self.high)}]"


def duration(seconds: float) -> str:
    if seconds < 1e-3:
        return f"{seconds * 1e6:.0f} µs"
    return f"{seconds * 1e3:.3g} ms"


def size_name(num_bytes: int) -> str:
    for unit in ("B", "KiB"):
        if num_bytes < 1024:
            return f"{num_bytes} {unit}"
        num_bytes //= 1024
    return f"{num_bytes} MiB"


def make_call(kind: str, num_bytes: int, world: int, group: dist.ProcessGroup) -> Callable[[], Any]:
    numel = max(1, num_bytes // 4)
    if kind == "barrier":
        return lambda: dist.barrier(group=group)
    if kind in ("all-reduce", "broadcast"):
        tensor = torch.zeros(numel)
        if kind == "broadcast":
            return lambda: dist.broadcast(tensor, 0, group=group)
        return lambda: dist.all_reduce(tensor, group=group)
    own = torch.zeros(-(-numel // world))
    full = torch.zeros(own.numel() * world)
    if kind == "all-gather":
        return lambda: _all_gather(full, own, group=group)
    if kind == "reduce-scatter":
        return lambda: _reduce_scatter(own, full, group=group)
    out = torch.zeros_like(full)
    return lambda: dist.all_to_all_single(out, full, group=group)


def time_calls(call: Callable[[], Any], num_calls: int, group: dist.ProcessGroup) -> float:
    """Seconds per call."""
    dist.barrier(group=group)
    begin_s = time.perf_counter()
    for _ in range(num_calls):
        call()
    return (time.perf_counter() - begin_s) / num_calls


def measure(
    world: int, rounds: int, kinds: list[str], sizes: list[int]
) -> dict[tuple[str, int], dict[str, Spread]]:
    groups = {"gloo": dist.group.WORLD, "shm": dist.new_group(backend="shm")}
    assert isinstance(groups["shm"], shm.SharedMemoryGroup)
    cases = [("barrier", 0)] + [(kind, size) for kind in kinds for size in sizes]
    found = {}
    for kind, num_bytes in cases:
        calls = {name: make_call(kind, num_bytes, world, group) for name, group in groups.items()}
        counts = {}
        for name, call in calls.items():
            time_calls(call, 2, groups["shm"])
            guess = torch.tensor(time_calls(call, 3, groups["shm"]))
            dist.broadcast(guess, 0, group=groups["shm"])
            counts[name] = max(2, min(1000, int(TURN_S / float(guess))))
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(time_calls(call, counts[name], groups["shm"]))
        found[kind, num_bytes] = {name: Spread.of(values) for name, values in times.items()}
    return found


def writing(rank: int, folder: str) -> list[float]:
    """Bytes a second at which rank 0 writes what rank 1 has read, with torch's copy and with paceline's; on rank 0.

    It tells whether the two are on processors that share a cache, which may change from minute to minute on a virtual
    machine.
    """
    group = dist.new_group(backend="shm")
    file = str(Path(folder) / "written")
    place = torch.from_file(file, shared=True, size=WRITTEN_BYTES, dtype=torch.uint8)
    own = torch.ones(WRITTEN_BYTES, dtype=torch.uint8)
    ways: list[Callable[[], object]] = [lambda: place.copy_(own), lambda: copying.write(place, own)]
    times: list[list[float]] = [[] for _ in ways]
    for _ in range(WRITINGS):
        for way, taken in zip(ways, times, strict=True):
            dist.barrier(group=group)
            if rank == 1:
                own.copy_(place)
            dist.barrier(group=group)
            if rank == 0:
                begin_s = time.perf_counter()
                way()
                taken.append(time.perf_counter() - begin_s)
    return [WRITTEN_BYTES / statistics.median(taken) for taken in times if taken]


def waiting(rank: int, rounds: int) -> float:
    """Seconds of processor time that this worker burns while it waits for the last rank, which is late."""
    group = dist.new_group(backend="shm")
    costs_s = []
    for _ in range(rounds):
        dist.barrier(group=group)
        if rank == dist.get_world_size() - 1:
            time.sleep(LATE_S)
        begin_s = time.process_time()
        dist.barrier(group=group)
        costs_s.append(time.process_time() - begin_s)
    return statistics.median(costs_s)


def work(rank: int, world: int, folder: str, options: argparse.Namespace, results: Any) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    warnings.simplefilter("ignore", FutureWarning)
    shm.register_shm()
    dist.init_process_group(
        "gloo", init_method=f"file://{Path(folder) / 'store'}", rank=rank, world_size=world
    )
    before = writing(rank, folder)
    if options.training:
        found: Any = collectives_training.measure(rank, world, options.rounds)
    else:
        found = measure(world, options.rounds, options.kinds, options.sizes)
    late = torch.tensor(waiting(rank, options.rounds))
    everyone = [torch.zeros_like(late) for _ in range(world)]
    dist.all_gather(everyone, late)
    after = writing(rank, folder)
    if rank == 0:
        results.put((found, [float(t) for t in everyone[:-1]], [before, after]))
    dist.barrier()
    dist.destroy_process_group()


def run(world: int, options: argparse.Namespace) -> tuple[Any, list[float], list[list[float]]]:
    context = multiprocessing.get_context("spawn")
    results = context.SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        arguments = (world, folder, options, results)
        started = multiprocessing.start_processes(work, arguments, world, join=False, start_method="spawn")
        found = results.get()
        while not started.join():
            pass
    return found


def table(found: dict[tuple[str, int], dict[str, Spread]]) -> list[str]:
    lines = ["| operation | size | gloo | shm | faster |", "|---|---|---|---|---|"]
    for (kind, num_bytes), times in found.items():
        ratio = times["gloo"].median / times["shm"].median
        size = size_name(num_bytes) if num_bytes else "–"
        lines.append(f"| {kind} | {size} | {times['gloo']} | {times['shm']} | {ratio:.1f}× |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 4, 8])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES), help="bytes")
    parser.add_argument(
        "--training", action="store_true", help="steps of DDP and FSDP2 instead of single operations"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lines = [f"torch {torch.__version__}, {len(usable_cores())} cores, {options.rounds} rounds"]
    for world in options.ranks:
        found, late_s, written = run(world, options)
        lines += ["", f"## {world} workers", ""]
        lines += collectives_training.table(found) if options.training else table(found)
        burnt = statistics.mean(late_s)
        plain, whole_lines = (
            " and ".join(f"{way / 1e9:.0f}" for way in ways) for ways in zip(*written, strict=True)
        )
        lines += [
            "",
            f"Rank 0 writes what rank 1 has read at {plain} GB/s with torch's copy, {whole_lines} with paceline's "
            "(before and after).",
            "",
            f"Waiting {LATE_S * 1e3:.0f} ms for one of them burns {duration(burnt)} of processor time a worker.",
        ]
    print("\n".join(lines))
    if options.out:
        options.out.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
