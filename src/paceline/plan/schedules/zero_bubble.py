"""Zero-bubble schedules: the gradients of the weights wait until there is nothing better to do."""

from __future__ import annotations

import functools
from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule, is_ready


class ZeroBubble(Schedule):
    """ZB-H1 (Qi et al. 2024): the backward pass in two parts, in the memory of 1F1B.

    The gradients of a stage's inputs, for which the stage before waits, come first; those of its weights fill what
    would be idle. The order is found by playing the step with equal costs, under a limit of p stored micro-batches:
    first gradients of inputs, then forward passes, then gradients of weights. With equal costs the idle time is about
    half of 1F1B's.
    """

    name: ClassVar[str] = "zb-h1"
    in_parts: ClassVar[bool] = True

    def actions(self, worker: int) -> list[Action]:
        return self._orders[worker]

    @property
    def _most_stored(self) -> int:
        return self.pp * self.stages_per_worker

    @functools.cached_property
    def _orders(self) -> list[list[Action]]:
        workers = [_Worker(self.stages_of(worker), self.num_micro) for worker in range(self.pp)]
        done: set[Action] = set()
        while any(worker.is_busy for worker in workers):
            # One tick: each worker takes what is ready at its beginning.
            taken = [(worker, self._best(worker, done)) for worker in workers]
            assert any(action for _, action in taken), "the limit leaves at least one micro-batch to finish"
            for worker, action in taken:
                if action is not None:
                    worker.take(action)
                    done.add(action)
        return [worker.order for worker in workers]

    def _best(self, worker: _Worker, done: set[Action]) -> Action | None:
        ready = [
            action
            for action in worker.candidates()
            if is_ready(action, done, self.num_stages)
            and (action.kind != "F" or self._may_store(action, worker))
        ]
        return min(ready, key=lambda a: ("IFW".index(a.kind), a.micro, -a.stage), default=None)

    def _may_store(self, action: Action, worker: _Worker) -> bool:
        return worker.stored < self._most_stored


class _Worker:
    """How far one worker has come: each stage takes its micro-batches in order."""

    def __init__(self, stages: list[int], num_micro: int) -> None:
        self.order: list[Action] = []
        self.stored = 0
        """Pairs of stage and micro-batch between their `F` and their `W`."""
        self.next = {(kind, stage): 0 for stage in stages for kind in "FIW"}
        self._num_micro = num_micro

    @property
    def is_busy(self) -> bool:
        return any(micro < self._num_micro for micro in self.next.values())

    def candidates(self) -> list[Action]:
        """The next action of each kind and stage."""
        return [Action(k, s, micro) for (k, s), micro in self.next.items() if micro < self._num_micro]

    def take(self, action: Action) -> None:
        self.order.append(action)
        self.next[action.kind, action.stage] += 1
        self.stored += (action.kind == "F") - (action.kind == "W")


class ZeroBubbleV(ZeroBubble):
    """ZBV (Qi et al. 2024): two stages a worker, down the workers and up again, so that the first worker has the loss.

    A worker stores at most 2 p micro-batches of its half stages: the memory of 1F1B. With equal costs and many
    micro-batches next to nothing is idle.
    """

    name: ClassVar[str] = "zbv"
    default_stages: ClassVar[int] = 2
    most_stages: ClassVar[int | None] = 2

    def worker_of(self, stage: int) -> int:
        return stage if stage < self.pp else 2 * self.pp - 1 - stage

    def _may_store(self, action: Action, worker: _Worker) -> bool:
        if worker.stored >= self._most_stored:
            return False
        if action.stage >= self.pp:
            return True
        # Room is left for the way back of what is under way: otherwise nothing could ever finish.
        down, up = (worker.next["F", stage] for stage in (action.stage, 2 * self.pp - 1 - action.stage))
        return worker.stored + down - up + 1 < self._most_stored
