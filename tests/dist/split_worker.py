"""Proves layouts of the jobs in `split_jobs.py`, and trains some to the end; each returns the proofs, and rank 0 saves what was trained."""

from __future__ import annotations

from pathlib import Path

import torch
from split_jobs import SPLIT_JOBS

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.errors import LayoutError
from paceline.records import Layout
from paceline.split import deferred
from paceline.train.loop import save
from paceline.train.proof import prove as prove_layout
from paceline.train.session import Datasets, Session


def prove_one(name: str, text: str, world: World) -> str:
    """The proof as JSON, or why the layout is out."""
    job, _ = SPLIT_JOBS[name]
    try:
        layout = Layout.parse(text)
        layout.check_batch(job.batch_size)
        mesh = make_mesh(world, layout)
        if mesh is None:
            return ""
        return prove_layout(job, mesh, Datasets(job, 7), seed=7, device=world.device).model_dump_json()
    except LayoutError as error:
        return str(error)


def train_one(name: str, text: str, world: World, directory: Path) -> dict[str, torch.Tensor]:
    """Train to the end: losses, metrics, and the whole state; the weights are saved in `directory`."""
    job, _ = SPLIT_JOBS[name]
    layout = Layout.parse(text)
    mesh = make_mesh(world, layout)
    if mesh is None:
        return {}
    session = Session(job, layout, seed=7, world=world, mesh=mesh)
    losses = [session.step(batch).loss for batch in session.batches()]
    metrics = session.evaluate()
    state = {f"state.{key}": value.clone() for key, value in session.whole_state() if value is not None}
    if world.rank == 0:
        directory.mkdir(parents=True)
    mesh.everyone.barrier("before saving")
    save(session, directory)
    return {"losses": torch.tensor(losses), "metrics": torch.tensor(list(metrics.values())), **state}


def prove_and_train(
    world: World, prove: list[tuple[str, str]], train: list[tuple[str, str]], directory: Path
) -> dict[str, str]:
    """By job and layout the proofs; what was trained is in `runs.pt`."""
    # These models are tiny: what is built in parts elsewhere shall be here, too.
    deferred.LEAST_BYTES = 64
    everyone = world.group(world.size)
    assert everyone is not None
    proofs, runs = {}, {}
    for name, text in prove:
        proofs[f"{name}/{text}"] = prove_one(name, text, world)
        everyone.barrier("between proofs")
    for name, text in train:
        runs[f"{name}/{text}"] = train_one(name, text, world, directory / name / text)
        everyone.barrier("between runs")
    if world.rank == 0:
        torch.save(runs, directory / "runs.pt")
    return proofs
