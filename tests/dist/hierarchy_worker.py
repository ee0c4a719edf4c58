"""What four workers on two hosts do, in one launch.

    torchrun … hierarchy_worker.py BYTES FOLDER

Counts by the network interface what a host really sends during each collective on a tensor of BYTES bytes, through
`Hierarchy` and through gloo alone: `sentHOST.json`. Then trains jobs of `jobs.py` in layouts: `losses.pt`.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from jobs import JOBS

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World, join
from paceline.records import Layout
from paceline.train.session import Session

TRAINED = ("clipped_weighted", "batch_norm_micro")
LAYOUTS = ("dp_replicate=4", "dp_shard=4", "dp_replicate=2,tp=2")


def sent_bytes() -> int:
    """By eth0 of this network namespace, since it was made."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, numbers = line.partition(":")
        if name.strip() == "eth0":
            return int(numbers.split()[8])
    raise LookupError("there is no eth0")


def measure(group: Group, call: Callable[[], object]) -> tuple[int, float]:
    """The fewest bytes and seconds of three calls; two barriers count, with some hundred bytes."""
    found = []
    for _ in range(3):
        # Read before this worker lets the others begin.
        begin_bytes = sent_bytes()
        group.barrier("before")
        begin_s = time.perf_counter()
        call()
        group.barrier("after")
        found.append((sent_bytes() - begin_bytes, time.perf_counter() - begin_s))
    return min(b for b, _ in found), min(s for _, s in found)


def measure_all(group: Group, tensor: torch.Tensor) -> dict[str, tuple[int, float]]:
    calls = {
        "all-reduce": lambda: group.sum_(tensor, "a test"),
        "all-gather": lambda: group.all_gather_(tensor, "a test"),
        "reduce-scatter": lambda: group.reduce_scatter_(tensor, "a test"),
        "broadcast": lambda: group.broadcast_(tensor, "a test"),
        "barrier": lambda: group.barrier("a test"),
    }
    return {name: measure(group, call) for name, call in calls.items()}


def train(name: str, axes: str, world: World) -> torch.Tensor:
    """The loss of each step."""
    job, micro = JOBS[name]
    layout = Layout.parse(f"{axes},micro={micro}")
    mesh = make_mesh(world, layout)
    assert mesh is not None
    assert mesh.everyone.transport == "shared memory + gloo"
    session = Session(job, layout, seed=7, world=world, mesh=mesh)
    return torch.tensor([session.step(batch).loss for batch in session.batches()])


def main() -> None:
    num_bytes, folder = int(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    world = join("cpu", timeout_s=60)
    over_gloo = dataclasses.replace(world, transport="gloo", groups={})
    sent: dict[str, dict[str, tuple[int, float]]] = {}
    for its_world in (world, over_gloo):
        group = its_world.group(world.size)
        assert group is not None
        sent[group.transport] = measure_all(group, torch.zeros(num_bytes // 4))
    if world.local_rank == 0:
        (folder / f"sent{world.rank // world.local_size}.json").write_text(json.dumps(sent))
    losses = {f"{name}/{layout}": train(name, layout, world) for name in TRAINED for layout in LAYOUTS}
    if world.rank == 0:
        torch.save(losses, folder / "losses.pt")
    world.leave()


if __name__ == "__main__":
    main()
