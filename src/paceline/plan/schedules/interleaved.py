"""Interleaved 1F1B."""

from __future__ import annotations

import functools
from typing import ClassVar

from paceline.plan.schedules.base import Action, Schedule, find_fault


class Interleaved(Schedule):
    """1F1B over several stages a worker, p micro-batches at a time (Narayanan et al. 2021).

    With v stages a worker and m a multiple of p, the idle share of the ideal time is (p − 1) / (v · m). Worker r stores
    up to 2 (p − r − 1) + (v − 1) p + 1 micro-batches of a stage each. Where m is no multiple of p the last
    round is smaller, and the warm-up as much longer as it has to be.
    """

    name: ClassVar[str] = "interleaved"
    default_stages: ClassVar[int] = 2
    most_stages: ClassVar[int | None] = None

    def actions(self, worker: int) -> list[Action]:
        return self._orders[worker]

    @functools.cached_property
    def _orders(self) -> list[list[Action]]:
        longest = self.num_micro * self.stages_per_worker
        for extra in range(longest + 1):
            orders = [self._with_warm_up(worker, extra) for worker in range(self.pp)]
            if not find_fault(orders, self.num_stages, self.num_micro, self.worker_of):
                return orders
        raise AssertionError("all forward passes first is always possible")

    def _with_warm_up(self, worker: int, extra: int) -> list[Action]:
        stages = self.stages_of(worker)
        forwards = self._rounds("F", stages)
        backwards = self._rounds("B", stages[::-1])
        warm_up = 2 * (self.pp - worker - 1) + (self.stages_per_worker - 1) * self.pp + extra
        warm_up = min(warm_up, len(forwards))
        order = forwards[:warm_up]
        for forward, backward in zip(forwards[warm_up:], backwards, strict=False):
            order += [forward, backward]
        return order + backwards[len(forwards) - warm_up :]

    def _rounds(self, kind: str, stages: list[int]) -> list[Action]:
        return [
            Action(kind, stage, micro)
            for begin in range(0, self.num_micro, self.pp)
            for stage in stages
            for micro in range(begin, min(begin + self.pp, self.num_micro))
        ]
