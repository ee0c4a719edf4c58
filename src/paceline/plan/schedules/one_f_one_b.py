"""1F1B."""

from __future__ import annotations

from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule


class OneForwardOneBackward(Schedule):
    """After a warm-up, one forward and one backward pass in turn (Narayanan et al. 2019, 2021).

    Idle share of the ideal time: (p − 1) / m, as GPipe. Worker r stores min(p − r, m) micro-batches.
    """

    name: ClassVar[str] = "1f1b"

    def actions(self, worker: int) -> list[Action]:
        warm_up = min(self.pp - worker - 1, self.num_micro)
        order = [Action("F", worker, micro) for micro in range(warm_up)]
        for micro in range(warm_up, self.num_micro):
            order += [Action("F", worker, micro), Action("B", worker, micro - warm_up)]
        return order + [Action("B", worker, m) for m in range(self.num_micro - warm_up, self.num_micro)]
