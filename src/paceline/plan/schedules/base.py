"""What a pipeline schedule is, and when it is right."""

from __future__ import annotations

import abc
import dataclasses
from typing import ClassVar


@dataclasses.dataclass(frozen=True)
class Action:
    """One piece of work of one worker."""

    kind: str
    """`F` forward, `B` whole backward, `I` gradients of the inputs alone, `W` gradients of the weights alone."""
    stage: int
    """Along the model, from 0; a worker may have several."""
    micro: int
    """Number of the micro-batch, from 0."""


class Schedule(abc.ABC):
    """The order in which each worker of a pipeline works through the micro-batches of one step."""

    name: ClassVar[str]
    """As a layout writes it."""
    default_stages: ClassVar[int] = 1
    """Of each worker."""
    most_stages: ClassVar[int | None] = 1
    """None: as many as the model has pieces for."""
    in_parts: ClassVar[bool] = False
    """Backward passes are `I` and `W` instead of `B`."""

    def __init__(self, pp: int, num_micro: int, stages_per_worker: int | None = None) -> None:
        self.pp, self.num_micro = pp, num_micro
        self.stages_per_worker = stages_per_worker or self.default_stages
        self.num_stages = pp * self.stages_per_worker

    def worker_of(self, stage: int) -> int:
        """The worker that has a stage."""
        return stage % self.pp

    @abc.abstractmethod
    def actions(self, worker: int) -> list[Action]:
        """What `worker` does, in this order; right for any number of micro-batches."""

    def stages_of(self, worker: int) -> list[int]:
        """The stages of a worker, ascending."""
        return [stage for stage in range(self.num_stages) if self.worker_of(stage) == worker]


def needs(action: Action, num_stages: int) -> list[Action]:
    """What must be done before `action`. Where a backward pass may be whole or in parts, both are listed."""
    stage, micro = action.stage, action.micro
    if action.kind == "F":
        return [Action("F", stage - 1, micro)] if stage else []
    if action.kind == "W":
        return [Action("I", stage, micro)]
    own = [Action("F", stage, micro)]
    return (
        own
        if stage == num_stages - 1
        else [*own, Action("B", stage + 1, micro), Action("I", stage + 1, micro)]
    )


def is_ready(action: Action, done: set[Action], num_stages: int) -> bool:
    """Whether all that `action` needs is among `done`."""
    required = needs(action, num_stages)
    if action.kind in "BI":
        return required[0] in done and (len(required) == 1 or required[1] in done or required[2] in done)
    return all(r in done for r in required)


def find_fault(orders: list[list[Action]], num_stages: int, num_micro: int, worker_of: object) -> str:
    """Why workers that follow `orders` would not do all work once, or would wait for each other; empty if they do.

    Sending does not wait; a worker waits for what its next action needs.
    """
    assert callable(worker_of)
    for worker, order in enumerate(orders):
        wanted = {(s, m) for s in range(num_stages) if worker_of(s) == worker for m in range(num_micro)}
        forwards = [(a.stage, a.micro) for a in order if a.kind == "F"]
        backwards = [(a.stage, a.micro) for a in order if a.kind in "BI"]
        weights = [(a.stage, a.micro) for a in order if a.kind in "BW"]
        for what, found in (("forward", forwards), ("backward", backwards), ("weights", weights)):
            if len(found) != len(set(found)) or set(found) != wanted:
                return f"worker {worker} does not do each {what} pass once"
    done: set[Action] = set()
    places = [0] * len(orders)
    while any(place < len(order) for place, order in zip(places, orders, strict=True)):
        moved = False
        for worker, order in enumerate(orders):
            while places[worker] < len(order) and is_ready(order[places[worker]], done, num_stages):
                done.add(order[places[worker]])
                places[worker] += 1
                moved = True
        if not moved:
            stuck = [str(o[p]) for p, o in zip(places, orders, strict=True) if p < len(o)]
            return f"workers wait for each other: {', '.join(stuck)}"
    return ""
