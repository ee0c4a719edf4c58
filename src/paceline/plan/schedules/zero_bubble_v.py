"""ZBV: zero bubble with two stages a worker, down the workers and up again."""

from __future__ import annotations

import collections
import functools
from typing import ClassVar

from paceline.plan.schedules.base import Action, Result, Schedule, needs, result_of


class ZeroBubbleV(Schedule):
    """ZBV (Qi et al. 2024, section 6): the first worker has the first stage and the last, and so the loss.

    Where forward pass, gradients of the inputs and of the weights cost the same, and m = p or m ≥ 2 p, each worker
    idles for p − 1 of them in a step: the share (p − 1) / (6 m + p − 1). With other costs or numbers it may idle
    longer. No worker stores more than min(2 p, 2 m) micro-batches of its half stages: as much as the first worker of
    1F1B.
    """

    name: ClassVar[str] = "zbv"
    default_stages: ClassVar[int] = 2
    most_stages: ClassVar[int | None] = 2
    in_parts: ClassVar[bool] = True

    def worker_of(self, stage: int) -> int:
        return stage if stage < self.pp else 2 * self.pp - 1 - stage

    def actions(self, worker: int) -> list[Action]:
        if self.num_micro > self.pp:
            return self._published(worker)
        # So few do not fill the warm-up of the published order, and the workers would idle longer.
        return list(_played(self.pp, self.num_micro)[worker])

    def _published(self, worker: int) -> list[Action]:
        """The order by phases; `d` is the worker's stage on the way down, `u` the one on the way up."""
        after = self.pp - worker
        warm_up = ["Fd"] * (2 * after - 1) + ["Fu", "Fd"] * worker + ["Fu", "Iu", "Wu"] * after
        steady = ["Fd", "Id", "Wd", "Fu", "Iu", "Wu"] * self.num_micro
        # No forward pass is left: gradients of weights wait as long as others wait for those of inputs.
        cool_down = ["Id", "Iu"] * worker + ["Id", "Wd"] * after + ["Wu", "Wd"] * self.num_micro

        # As if there were enough micro-batches for the warm-up: those that are not there are left out.
        most = max(self.num_micro, 2 * self.pp)
        num_steady = 6 * (most - warm_up.count("Fu"))
        stage_of = {"d": worker, "u": 2 * self.pp - 1 - worker}
        order: list[Action] = []
        taken: collections.Counter[str] = collections.Counter()
        for what in warm_up + steady[:num_steady] + cool_down:
            if taken[what] < self.num_micro:
                order.append(Action(what[0], stage_of[what[1]], taken[what]))
            taken[what] += 1
        return order


@functools.lru_cache(maxsize=64)
def _played(pp: int, num_micro: int) -> tuple[tuple[Action, ...], ...]:
    """The order of each worker in a step with equal costs, for at most p micro-batches, which may all be stored.

    In each tick each worker does what is ready: gradients of inputs before forward passes before gradients of weights.
    """
    last = 2 * pp - 1
    done: set[Result] = set()
    orders: list[list[Action]] = [[] for _ in range(pp)]
    following = [dict.fromkeys(((k, s) for k in "IFW" for s in (last - w, w)), 0) for w in range(pp)]
    while any(len(order) < 6 * num_micro for order in orders):
        ready: list[Action | None] = []
        for mine in following:
            # Of each kind, the earlier micro-batch first, and of one micro-batch the later stage.
            able = [Action(k, s, m) for (k, s), m in mine.items() if m < num_micro]
            able = [a for a in able if done.issuperset(needs(a, last + 1))]
            ready.append(min(able, key=lambda a: ("IFW".index(a.kind), a.micro), default=None))
        for order, mine, action in zip(orders, following, ready, strict=True):
            if action is not None:
                order.append(action)
                mine[action.kind, action.stage] += 1
                result = result_of(action)
                if result is not None:
                    done.add(result)
    return tuple(map(tuple, orders))
