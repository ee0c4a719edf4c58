"""Moves trainings from layout to layout; rank 0 writes what came of it.

The state is collected before and after each move, and the training goes on after it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from moving_jobs import MOVING_JOBS, STEPS

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World, join
from paceline.records import Layout
from paceline.split import deferred
from paceline.train.session import Session
from paceline.train.training_state import TrainingState


def flat(state: TrainingState) -> dict[str, Any]:
    """Everything in one dictionary that torch.save knows."""
    found: dict[str, Any] = {f"parameter.{name}": tensor for name, tensor in state.parameters.items()}
    found |= {f"buffer.{name}": tensor for name, tensor in state.buffers.items()}
    for name, values in state.optimizer.of.items():
        found |= {f"optimizer.{name}.{key}": value for key, value in values.items()}
    for number, group in enumerate(state.optimizer.groups):
        found |= {f"group.{number}.{key}": value for key, value in group.items()}
    return found | {"steps": state.num_steps, "schedule": state.scheduler}


def train(name: str, texts: list[str], world: World) -> dict[str, Any]:
    """Some steps in each layout; losses, the state before and after each move, metrics and weights at the end."""
    job = MOVING_JOBS[name]
    losses: list[float] = []
    moves: list[tuple[dict[str, Any], dict[str, Any]]] = []
    state: TrainingState | None = None
    result: dict[str, Any] = {}
    everyone = world.group(world.size)
    assert everyone is not None
    position = 0, 0
    for text in texts:
        layout = Layout.parse(text)
        mesh = make_mesh(world, layout)
        position = everyone.gather_json(position, "the position")[0]
        if mesh is None:
            continue
        session = Session(job, layout, seed=7, world=world, mesh=mesh, total_steps=STEPS * len(texts))
        if losses or position != [0, 0]:
            session.load_state(state)
            found = session.collect_state()
            if state is not None and mesh.rank == 0:
                moves.append((flat(state), flat(found)))
        for batch in session.batches(epochs=100, steps=STEPS, after=tuple(position)):
            losses.append(session.step(batch).loss)
            position = batch.epoch, batch.index + 1
        state = session.collect_state()
        metrics = session.evaluate()
        if mesh.rank == 0:
            result = {"losses": torch.tensor(losses), "metrics": torch.tensor(list(metrics.values()))}
            result |= {"moves": moves, "end": flat(state)}
    return result


def main() -> None:
    asked = json.loads(Path(sys.argv[1]).read_text())
    # These models are tiny: what is built in parts elsewhere shall be here, too.
    deferred.LEAST_BYTES = 64
    world = join("cpu", timeout_s=60)
    results = {f"{name}/{' '.join(texts)}": train(name, texts, world) for name, texts in asked}
    if world.rank == 0:
        torch.save(results, sys.argv[2])
    world.leave()


if __name__ == "__main__":
    main()
