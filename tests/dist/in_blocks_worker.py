"""Measures a job with all that `measure_all` does, whole or in blocks: a GPT of 13 M parameters, or one with batch norm.

    python in_blocks_worker.py FOLDER JOB WHY       # or under torchrun

An empty WHY: whole. Rank 0 leaves `profile.json` and `cluster.json`; and of two workers `cuts.json`: where the training
then cuts a pipeline.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from gpt_job import gpt
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World, gather_cluster, join
from paceline.records import Layout
from paceline.train.allocator import keep_freed_memory
from paceline.train.planning import measure_all
from paceline.train.session import Datasets, Session


def normed() -> paceline.Job:
    """Blocks that take statistics over the batch."""

    def model() -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.ReLU()) for _ in range(3)]
        return nn.Sequential(*blocks, nn.Linear(64, 4))

    inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    return paceline.Job(
        model=model,
        data=lambda split: TensorDataset(inputs, inputs[:, :4].argmax(1)),
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1, momentum=0.9),
        batch_size=16,
    )


def trained_cuts(job: paceline.Job, world: World, layout: Layout) -> list[int]:
    """Of each stage the first call of a piece, and the number of calls."""
    mesh = make_mesh(world, layout)
    session = Session(job, layout, world=world, mesh=mesh)
    session.step(next(iter(session.batches(steps=1))))
    parts = session._replica.parts
    assert parts is not None
    assert parts.stages is not None
    stage_of = list(parts.stages.calls.values())
    return [*(stage_of.index(stage) for stage in range(layout.pp)), len(stage_of)]


def main(folder: Path, name: str, why: str) -> None:
    job = normed() if name == "normed" else gpt(512, blocks=4, vocabulary=1024, batch_size=16)
    world = join("cpu", 120.0)
    everyone = world.group(world.size)
    assert everyone is not None
    keep_freed_memory()
    cluster = gather_cluster(everyone, world)
    found = measure_all(
        job,
        Datasets(job, 0),
        world,
        everyone,
        cluster,
        seed=0,
        threads=1,
        budget_s=1.0,
        why_in_blocks=why,
    )
    for record_name, record in zip(("profile", "cluster"), found or (), strict=found is not None):
        (folder / f"{record_name}.json").write_text(json.dumps(record.to_json()))
    if world.size == 2:
        cuts = trained_cuts(job, world, Layout(pp=2, micro=2, threads=1))
        if found is not None:
            (folder / "cuts.json").write_text(json.dumps(cuts))
    world.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
