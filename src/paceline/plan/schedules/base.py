"""What a pipeline schedule is, and when it is right."""

from __future__ import annotations

import abc
import collections
import dataclasses
from collections.abc import Callable, Sequence
from typing import ClassVar

from paceline.errors import LayoutError


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
    """The order in which each worker of a pipeline works through the micro-batches of one step.

    It is right for any number of micro-batches, as the last global batch of an epoch may have fewer. The largest
    peak of stored micro-batches among the workers is then no larger. `check` proves an order right.
    """

    name: ClassVar[str]
    """As a layout writes it."""
    default_stages: ClassVar[int] = 1
    """Of each worker."""
    most_stages: ClassVar[int | None] = 1
    """Of each worker, who then has just so many; None: any number for which the model has pieces."""
    in_parts: ClassVar[bool] = False
    """Backward passes are `I` and `W` instead of `B`."""

    def __init__(self, pp: int, num_micro: int, stages_per_worker: int | None = None) -> None:
        """
        Raises:
            LayoutError: a size below 1, or a number of stages that this schedule cannot give a worker.
        """
        given = self.default_stages if stages_per_worker is None else stages_per_worker
        for key, size in (("pp", pp), ("micro", num_micro), ("stages", given)):
            if size < 1:
                raise LayoutError(
                    f"{key}={size} with schedule={self.name}",
                    cause=f"{key} is a whole number of at least 1",
                    next_step=f"use {key}={self.default_stages if key == 'stages' else 1}",
                )
        if self.most_stages is not None and given != self.most_stages:
            plural = "s" if self.default_stages > 1 else ""
            raise LayoutError(
                f"stages={given} with schedule={self.name}",
                cause=f"{self.name} gives each worker {self.default_stages} stage{plural}",
                next_step=f"use stages={self.default_stages}, or schedule=interleaved,stages={given}",
            )
        self.pp, self.num_micro, self.stages_per_worker = pp, num_micro, given
        self.num_stages = pp * given

    def worker_of(self, stage: int) -> int:
        """The worker that has a stage."""
        return stage % self.pp

    @abc.abstractmethod
    def actions(self, worker: int) -> list[Action]:
        """What `worker` does, in this order."""

    def stages_of(self, worker: int) -> list[int]:
        """The stages of a worker, ascending."""
        return [stage for stage in range(self.num_stages) if self.worker_of(stage) == worker]


class InvalidScheduleError(RuntimeError):
    """An order that does not do all work once, or cannot be worked through: a bug of ours, no user's mistake."""


Result = tuple[str, int, int]
"""What an action leaves for others: `F` a stage's outputs or `I` the gradients of its inputs; stage; micro-batch."""


def needs(action: Action, num_stages: int) -> list[Result]:
    """What must be there before `action` can begin: what its own stage made comes first."""
    stage, micro = action.stage, action.micro
    if action.kind == "F":
        return [("F", stage - 1, micro)] if stage else []
    if action.kind == "W":
        return [("I", stage, micro)]
    own: Result = ("F", stage, micro)
    return [own] if stage == num_stages - 1 else [own, ("I", stage + 1, micro)]


def result_of(action: Action) -> Result | None:
    """What others may need of `action`: nothing of the gradients of weights."""
    if action.kind == "W":
        return None
    return ("F" if action.kind == "F" else "I", action.stage, action.micro)


def execution(orders: Sequence[Sequence[Action]], num_stages: int) -> list[tuple[int, Action]]:
    """All actions with their workers, each after what it needs.

    Each worker keeps strictly to its order: it waits for what its next action needs. Sending does not wait.

    Raises:
        InvalidScheduleError: workers wait for each other.
    """
    done: set[Result] = set()
    places = [0] * len(orders)
    waiting: dict[Result, list[int]] = collections.defaultdict(list)
    found: list[tuple[int, Action]] = []
    able = list(range(len(orders)))
    while able:
        worker = able.pop()
        for action in orders[worker][places[worker] :]:
            missing = [need for need in needs(action, num_stages) if need not in done]
            if missing:
                waiting[missing[0]].append(worker)
                break
            found.append((worker, action))
            places[worker] += 1
            result = result_of(action)
            if result is not None:
                done.add(result)
                able += waiting.pop(result, [])
    stuck = [
        f"worker {w} at {o[p]}" for w, (o, p) in enumerate(zip(orders, places, strict=True)) if p < len(o)
    ]
    if stuck:
        raise InvalidScheduleError(f"workers wait for each other: {'; '.join(stuck)}")
    return found


def find_fault(
    orders: Sequence[Sequence[Action]], num_stages: int, num_micro: int, worker_of: Callable[[int], int]
) -> str:
    """Why workers that follow `orders` would not do all work once, or would wait for each other; empty if they do.

    Each stage must take the micro-batches in ascending order, since what stages send each other carries no number
    (`paceline.comm.links`).
    """
    for worker, order in enumerate(orders):
        wanted = [(s, m) for s in range(num_stages) if worker_of(s) == worker for m in range(num_micro)]
        if any(action.kind not in tuple("FBIW") for action in order):
            return f"worker {worker} does something unknown"
        for what, kinds in (("forward", "F"), ("backward", "BI"), ("weights", "BW")):
            if sorted((action.stage, action.micro) for action in order if action.kind in kinds) != wanted:
                return f"worker {worker} does not do each {what} pass once"
    try:
        execution(orders, num_stages)
    except InvalidScheduleError as error:
        return str(error)
    for worker, order in enumerate(orders):
        for stage in sorted({action.stage for action in order}):
            for what, kinds in (("forward", "F"), ("backward", "BI")):
                micros = [a.micro for a in order if a.kind in kinds and a.stage == stage]
                if micros != sorted(micros):
                    return f"worker {worker} takes the {what} passes of stage {stage} as {micros}"
    return ""


def check(schedule: Schedule) -> None:
    """Prove `schedule` right: see `find_fault`.

    Raises:
        InvalidScheduleError: what is wrong, and with which worker.
    """
    orders = [schedule.actions(worker) for worker in range(schedule.pp)]
    fault = find_fault(orders, schedule.num_stages, schedule.num_micro, schedule.worker_of)
    if fault:
        raise InvalidScheduleError(f"{schedule.name} (pp={schedule.pp}, micro={schedule.num_micro}): {fault}")
