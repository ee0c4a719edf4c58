"""One of several workers on one GPU: proves layouts, and trains some."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

sys.path.extend([str(Path(__file__).parents[1]), str(Path(__file__).parents[1] / "dist")])

from split_jobs import SPLIT_JOBS
from split_worker import prove_one
from through_host import go_through_host

from paceline.comm.mesh import make_mesh
from paceline.comm.world import join
from paceline.records import Layout
from paceline.split import deferred
from paceline.train.session import Session


def losses_of(name: str, text: str, world) -> list[float]:
    layout = Layout.parse(text)
    mesh = make_mesh(world, layout)
    if mesh is None:
        return []
    session = Session(SPLIT_JOBS[name][0], layout, seed=7, world=world, mesh=mesh)
    return [session.step(batch).loss for batch in session.batches()]


def main() -> None:
    """Arguments: rank, number of workers, port, and as JSON what to prove and what to train."""
    rank, size, port, prove, train = json.loads(sys.argv[1])
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size), LOCAL_RANK="0", LOCAL_WORLD_SIZE="1")
    go_through_host()
    deferred.LEAST_BYTES = 64
    world = join("cuda", 120, port)
    everyone = world.group(size)
    assert everyone is not None
    found = {"proofs": {}, "losses": {}, "transport": everyone.transport, "device": str(world.device)}
    for name, text in prove:
        found["proofs"][f"{name}/{text}"] = prove_one(name, text, world)
        everyone.barrier("between proofs")
    for name, text in train:
        found["losses"][f"{name}/{text}"] = losses_of(name, text, world)
        everyone.barrier("between runs")
    if rank == 0:
        print(json.dumps(found))
    sys.stdout.flush()
    everyone.barrier("the end")
    world.leave()


if __name__ == "__main__":
    main()
