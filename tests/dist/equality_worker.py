"""Trains every job of `jobs.py` on the first 1, 2, 3 and 4 of four workers; rank 0 writes what came out.

Through shared memory, where there is any, and on 2 and 3 workers through gloo as well.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from jobs import JOBS

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.train.session import Session


def train(name: str, size: int, world: World) -> dict[str, torch.Tensor] | None:
    job, micro = JOBS[name]
    layout = Layout(dp_replicate=size, micro=micro)
    mesh = make_mesh(world, layout)
    if mesh is None:
        return None
    session = Session(job, layout, seed=7, world=world, mesh=mesh)
    seen: list[dict[str, torch.Tensor]] = []

    def keep_gradients(*_: object) -> None:
        if len(seen) < 2:
            whole = session._replica.state.gradients()
            seen.append({name: g.clone() for name, g in whole if g is not None})

    session.optimizer.register_step_pre_hook(keep_gradients)
    losses = [session.step(batch).loss for batch in session.batches()]
    metrics = session.evaluate()
    result = {"losses": torch.tensor(losses), "metrics": torch.tensor(list(metrics.values()))}
    trained = [name for name, parameter in session.model.named_parameters() if parameter.requires_grad]
    for step, gradients in enumerate(seen):
        result |= {f"gradient.{step}.{trained.index(name)}": gradient for name, gradient in gradients.items()}
    result |= {f"state.{key}": value.clone() for key, value in session.model.state_dict().items()}
    return result


def train_all(world: World, out: Path) -> None:
    everyone = world.group(world.size)
    assert everyone is not None
    with_gloo = dataclasses.replace(world, transport="gloo", groups={})
    ways = {"1": (1, world), "2": (2, world), "3": (3, world), "4": (4, world)}
    ways |= {"2 gloo": (2, with_gloo), "3 gloo": (3, with_gloo)}
    results = {}
    for name in JOBS:
        for way, (size, its_world) in ways.items():
            result = train(name, size, its_world)
            if world.rank == 0:
                results[f"{name}/{way}"] = result
            everyone.barrier("between jobs")
    again = train("dropout", 2, world)
    if world.rank == 0:
        results["dropout/again"] = again
        torch.save(results, out)
