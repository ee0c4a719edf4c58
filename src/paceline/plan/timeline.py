"""Playing a pipeline schedule through, event by event, with given costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from paceline.plan.schedules.base import Action, Schedule, needs


@dataclasses.dataclass(frozen=True)
class Span:
    """One action in time."""

    action: Action
    begin_s: float
    end_s: float


@dataclasses.dataclass(frozen=True)
class Timeline:
    """One step of a pipeline."""

    spans: tuple[tuple[Span, ...], ...]
    """Of each worker, in order."""
    peak_stored: tuple[int, ...]
    """Largest number of (stage, micro-batch) pairs whose activations each worker held."""

    @property
    def makespan_s(self) -> float:
        return max(spans[-1].end_s for spans in self.spans)

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Of each worker: the share of the step in which it waits."""
        whole_s = self.makespan_s
        return tuple(1 - sum(s.end_s - s.begin_s for s in spans) / whole_s for spans in self.spans)


def simulate(
    schedule: Schedule,
    forward_s: Sequence[float],
    input_s: Sequence[float],
    weight_s: Sequence[float],
    send_s: float = 0.0,
) -> Timeline:
    """Play `schedule`.

    Args:
        forward_s, input_s, weight_s: seconds of each stage for one micro-batch: its forward pass, and the gradients
            of its inputs and of its weights, which together are the backward pass.
        send_s: until a value or gradient is at another worker.
    """
    orders = [schedule.actions(worker) for worker in range(schedule.pp)]
    places, free_s = [0] * len(orders), [0.0] * len(orders)
    spans: list[list[Span]] = [[] for _ in orders]
    ends_s: dict[Action, float] = {}
    moved = True
    while moved:
        moved = False
        for worker, order in enumerate(orders):
            while places[worker] < len(order):
                action = order[places[worker]]
                begin_s = _ready_s(action, ends_s, schedule, worker, send_s)
                if begin_s is None:
                    break
                begin_s = max(begin_s, free_s[worker])
                end_s = begin_s + _cost_s(action, forward_s, input_s, weight_s)
                ends_s[action] = free_s[worker] = end_s
                spans[worker].append(Span(action, begin_s, end_s))
                places[worker] += 1
                moved = True
    return Timeline(tuple(map(tuple, spans)), tuple(_peak(order) for order in orders))


def _ready_s(
    action: Action, ends_s: dict[Action, float], schedule: Schedule, worker: int, send_s: float
) -> float | None:
    """When what `action` needs is there; None while that is not known."""
    required = needs(action, schedule.num_stages)
    if not required:
        return 0.0
    own, *later = required
    if own not in ends_s:
        return None
    ready_s = ends_s[own] + (send_s if schedule.worker_of(own.stage) != worker else 0.0)
    if later:
        found = [ends_s[a] for a in later if a in ends_s]
        if not found:
            return None
        away = schedule.worker_of(later[0].stage) != worker
        ready_s = max(ready_s, found[0] + (send_s if away else 0.0))
    return ready_s


def _cost_s(
    action: Action, forward_s: Sequence[float], input_s: Sequence[float], weight_s: Sequence[float]
) -> float:
    stage = action.stage
    costs = {"F": forward_s[stage], "I": input_s[stage], "W": weight_s[stage]}
    return costs["I"] + costs["W"] if action.kind == "B" else costs[action.kind]


def _peak(order: Sequence[Action]) -> int:
    stored = peak = 0
    for action in order:
        stored += (action.kind == "F") - (action.kind in "BW")
        peak = max(peak, stored)
    return peak
