"""What it takes to get from each worker's gradients to updated parameters on all, and what its bytes alone would take.

    python benchmarks/synchronisation.py                     # 2 workers
    python benchmarks/synchronisation.py --workers 4 --out docs/synchronisation_table.md

No model is computed: gradients are random numbers that are simply there, so that only the reduction and the optimizer
(AdamW, fused) are timed. Three ways take turns: the parameters shared (`split/shared_parameters.py`), and gradients in
buckets (`comm/gradients.py`) through shared memory or gloo, with the whole optimizer on each worker.

Beside each stands the time that its memory traffic would take at the bandwidth of a plain copy, measured in the same
processes, all of them copying at once.
"""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from peer_table import spread
from torch import nn

from paceline.comm.gradients import GradientSync
from paceline.comm.group import Group
from paceline.comm.threads import take_cores
from paceline.comm.world import World, join
from paceline.split.deferred import DeferredParameters
from paceline.split.granularity import NUMBERS
from paceline.split.shared_parameters import SharedParameters
from paceline.split.swap import swap_parameters
from paceline.train.allocator import keep_freed_memory

MIB = 1 << 20
SIZES_MIB = (1, 8, 64, 256)
LAYERS = 8
COPY_BYTES = 256 * MIB
ROUNDS = 9
NUM_SUMS = 9

# Memory traffic of one worker, in bytes for each byte of parameters, with N workers. Gradients are copied (read and
# written), added up, and AdamW reads parameter, gradient and two moments, and writes three of them. What goes through a
# socket is copied into the kernel and out of it; two workers swap everything, more send rings.
TRAFFIC: dict[str, Callable[[int], float]] = {
    "shared parameters": lambda n: 2 + (1 + 1 / n) + 7 / n,
    "buckets, shared memory": lambda n: 2 + (5 if n == 2 else 7) + 7,
    "buckets, gloo": lambda n: 2 + (7 if n == 2 else 11 * (n - 1) / n) + 7,
}


@dataclasses.dataclass
class Way:
    """One way to synchronise; `step` does it, with the gradients that the model's parameters have."""

    model: nn.Module
    step: Callable[[], None]
    seconds: list[float] = dataclasses.field(default_factory=list)


def build(size_mib: int) -> nn.Module:
    torch.manual_seed(0)
    width = round((size_mib * MIB / 4 / LAYERS) ** 0.5)
    return nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(LAYERS)))


def shared(size_mib: int, group: Group) -> Way:
    model = build(size_mib)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    parameters = SharedParameters(
        dict(model.named_parameters()), group, DeferredParameters(), NUM_SUMS, kind=NUMBERS
    )
    swap_parameters(optimizer, parameters.replaced)

    def step() -> None:
        parameters.finish(torch.zeros(NUM_SUMS), None)
        optimizer.step()
        parameters.publish()

    return Way(model, step)


def bucketed(size_mib: int, group: Group) -> Way:
    model = build(size_mib)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    sync = GradientSync(list(model.parameters()), group, NUM_SUMS)

    def step() -> None:
        sync.finish(torch.zeros(NUM_SUMS), None)
        optimizer.step()

    return Way(model, step)


def copy_bandwidth(group: Group) -> float:
    """Bytes read and written per second by each worker, while all copy; the median over workers and rounds."""
    source, target = torch.ones(COPY_BYTES // 4), torch.zeros(COPY_BYTES // 4)
    seconds = []
    for _ in range(ROUNDS):
        group.barrier("before a copy")
        begin_s = time.perf_counter()
        target.copy_(source)
        seconds.append(time.perf_counter() - begin_s)
    told = group.gather_json(median(seconds), "copy times")
    return 2 * COPY_BYTES / median(told)


def work(out: Path | None) -> None:
    """One worker."""
    world = join("cpu", timeout_s=120)
    keep_freed_memory()
    take_cores(world.local_rank, world.local_size)
    group = world.group(world.size)
    assert group is not None
    with_gloo = dataclasses.replace(world, transport="gloo", groups={})
    other = with_gloo.group(world.size)
    assert other is not None
    bandwidth = copy_bandwidth(group)
    lines = [
        f"{world.size} workers; a copy moves {bandwidth / 1e9:.1f} GB/s per worker (read and written, all at once).",
        "",
        "| parameters | way | ms: median (middle half) | moved per worker | at that speed, ms | ratio |",
        "|---" * 6 + "|",
    ]
    for size_mib in SIZES_MIB:
        lines += rows(size_mib, group, other, bandwidth, world)
    if world.rank == 0:
        text = "\n".join(lines) + "\n"
        print(text)
        if out is not None:
            out.write_text(text)
    world.leave()


def rows(size_mib: int, group: Group, other: Group, bandwidth: float, world: World) -> list[str]:
    ways = {
        "shared parameters": shared(size_mib, group),
        "buckets, shared memory": bucketed(size_mib, group),
        "buckets, gloo": bucketed(size_mib, other),
    }
    repeat = max(1, min(20, 64 // size_mib))
    for number in range(ROUNDS + 1):
        for way in ways.values():
            gradients = [torch.full_like(p, 1e-3 * (1 + world.rank)) for p in way.model.parameters()]
            total_s = 0.0
            for _ in range(repeat):
                for parameter, gradient in zip(way.model.parameters(), gradients, strict=True):
                    parameter.grad = gradient.clone()
                group.barrier("before a step")
                begin_s = time.perf_counter()
                way.step()
                group.barrier("after a step")
                total_s += time.perf_counter() - begin_s
            if number > 0:
                way.seconds.append(total_s / repeat)
    found = []
    for name, way in ways.items():
        moved = TRAFFIC[name](group.size) * size_mib * MIB
        least_s = moved / bandwidth
        found.append(
            f"| {size_mib} MiB | {name} | {spread([s * 1e3 for s in way.seconds], 2)} | {moved / MIB:.0f} MiB "
            f"| {least_s * 1e3:.2f} | {median(way.seconds) / least_s:.2f} |"
        )
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.out)
        return
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={arguments.workers}",
    ]
    out = [f"--out={arguments.out}"] if arguments.out else []
    subprocess.run([*launch, __file__, "--work", *out], check=True)


if __name__ == "__main__":
    main()
