"""Looped breadth-first."""

from __future__ import annotations

from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule


class BreadthFirst(Schedule):
    """Several stages a worker; all micro-batches pass one before the next begins (Lamy-Poirier 2023).

    With v stages a worker and m ≥ p micro-batches, the idle share of the ideal time is (p − 1) / (v · m).
    Stores all m micro-batches of v stages. Parameters that are sharded are gathered once for each stage, not for each
    micro-batch.
    """

    name: ClassVar[str] = "bfs"
    default_stages: ClassVar[int] = 2
    most_stages: ClassVar[int | None] = None

    def actions(self, worker: int) -> list[Action]:
        stages = self.stages_of(worker)
        forwards = [Action("F", stage, micro) for stage in stages for micro in range(self.num_micro)]
        backwards = [Action("B", stage, m) for stage in reversed(stages) for m in range(self.num_micro)]
        return forwards + backwards
