"""GPipe."""

from __future__ import annotations

from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule


class GPipe(Schedule):
    """All forward passes, then all backward passes (Huang et al. 2019).

    Idle share of the ideal time: (p − 1) / m. Stores all m micro-batches.
    """

    name: ClassVar[str] = "gpipe"

    def actions(self, worker: int) -> list[Action]:
        forwards = [Action("F", worker, micro) for micro in range(self.num_micro)]
        return forwards + [Action("B", worker, micro) for micro in range(self.num_micro)]
