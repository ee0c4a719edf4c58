"""ZB-H1: the gradients of the weights wait until there is nothing better to do."""

from __future__ import annotations

from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule


class ZeroBubble(Schedule):
    """ZB-H1 (Qi et al. 2024): 1F1B with the backward pass in two parts, in the same peak memory.

    The gradients of a stage's inputs, for which the stage before waits, come at once. Those of its weights come r
    micro-batches later on worker r, and so fill what 1F1B idles at the end.

    With m ≥ p and weight gradients that cost no more than a forward pass or input gradients, the idle time is
    (p − 1)(F + I − W) (their table 2): a third of 1F1B's (p − 1)(F + I + W) where the three cost the same. Every worker
    stores min(p, m) micro-batches, as many as the first worker of 1F1B.
    """

    name: ClassVar[str] = "zb-h1"
    in_parts: ClassVar[bool] = True

    def actions(self, worker: int) -> list[Action]:
        warm_up = min(self.pp - worker - 1, self.num_micro)
        order = [Action("F", worker, micro) for micro in range(warm_up)]
        for micro in range(self.num_micro):
            if micro + warm_up < self.num_micro:
                order.append(Action("F", worker, micro + warm_up))
            order.append(Action("I", worker, micro))
            if micro >= worker:
                order.append(Action("W", worker, micro - worker))
        left = range(max(0, self.num_micro - worker), self.num_micro)
        return order + [Action("W", worker, micro) for micro in left]
