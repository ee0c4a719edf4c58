"""Playing a pipeline schedule through, event by event, with given costs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from paceline.plan.schedules.base import (
    Action,
    InvalidScheduleError,
    Result,
    Schedule,
    execution,
    needs,
    result_of,
)


@dataclasses.dataclass(frozen=True)
class Hop:
    """What crosses one cut between stages, in either direction: nothing where both stages are one worker's."""

    there_s: float = 0.0
    """Until it is at the other worker, once its way is free."""
    busy_s: float = 0.0
    """Until the same worker may send the next over the same medium."""
    medium: int = 0
    """What a worker sends over different media, to its own host and to others, does not wait for each other."""


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
    """Largest number of (stage, micro-batch) pairs whose activations each worker held: from `F` to the end of `B` or
    `W`."""

    @property
    def makespan_s(self) -> float:
        return max(spans[-1].end_s for spans in self.spans)

    @property
    def idle_shares(self) -> tuple[float, ...]:
        """Of each worker: the share of the step in which it waits; 0 in a step that takes no time."""
        whole_s = self.makespan_s
        if not whole_s:
            return (0.0,) * len(self.spans)
        return tuple(1 - sum(s.end_s - s.begin_s for s in spans) / whole_s for spans in self.spans)

    @property
    def idle_share(self) -> float:
        """Of all workers together."""
        return sum(self.idle_shares) / len(self.spans)


def simulate(
    schedule: Schedule,
    forward_s: Sequence[float],
    input_s: Sequence[float],
    weight_s: Sequence[float],
    hops: Sequence[Hop] = (),
) -> Timeline:
    """Play `schedule`. A worker begins each action as soon as it is free and what the action needs is there.

    Args:
        forward_s, input_s, weight_s: seconds of each stage for one micro-batch: its forward pass, and the gradients
            of its inputs and of its weights, which together are the backward pass.
        hops: of each cut; none: what is sent is there at once. Sending keeps no worker busy, only its way: what
            it sends over a medium goes one after the other.

    Raises:
        InvalidScheduleError: workers wait for each other.
    """
    orders = [schedule.actions(worker) for worker in range(schedule.pp)]
    backward_s = [i + w for i, w in zip(input_s, weight_s, strict=True)]
    costs_s = {"F": forward_s, "B": backward_s, "I": input_s, "W": weight_s}
    worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
    ends_s: dict[Result, float] = {}
    there_s: dict[Result, float] = {}
    way_free_s: dict[tuple[int, int], float] = {}
    free_s = [0.0] * schedule.pp
    spans: list[list[Span]] = [[] for _ in orders]
    for worker, action in execution(orders, schedule.num_stages):
        begin_s = free_s[worker]
        for need in needs(action, schedule.num_stages):
            away = worker_of[need[1]] != worker
            begin_s = max(begin_s, (there_s if away else ends_s)[need])
        free_s[worker] = end_s = begin_s + costs_s[action.kind][action.stage]
        result = result_of(action)
        if result is not None:
            ends_s[result] = there_s[result] = end_s
            cut = action.stage if action.kind == "F" else action.stage - 1
            if 0 <= cut < len(hops) and worker_of[cut] != worker_of[cut + 1]:
                way = worker, hops[cut].medium
                sent_s = max(end_s, way_free_s.get(way, 0.0))
                way_free_s[way] = sent_s + hops[cut].busy_s
                there_s[result] = sent_s + hops[cut].there_s
        spans[worker].append(Span(action, begin_s, end_s))
    return Timeline(tuple(map(tuple, spans)), tuple(peak_of(coded(order)) for order in orders))


def makespan_s(
    orders: Sequence[Sequence[Coded]],
    worker_of: Sequence[int],
    num_micro: int,
    costs_s: Sequence[float],
    hops: Sequence[Hop] = (),
) -> float:
    """`simulate(…).makespan_s` of orders in numbers (`coded`), many times as fast.

    Args:
        costs_s: seconds of `3 · stage + kind`, kinds as in `coded`; a whole backward pass is the sum of its two parts.
        hops: as in `simulate`.

    Raises:
        InvalidScheduleError: workers wait for each other.
    """
    num_stages = len(worker_of)
    unknown = -1.0
    # When the outputs of a stage, and the gradients of its inputs, are where they are needed.
    outputs_s, gradients_s = ([unknown] * (num_stages * num_micro) for _ in range(2))
    free_s, places = [0.0] * len(orders), [0] * len(orders)
    waiting: dict[tuple[bool, int], int] = {}
    there_s, busy_s, media = [0.0] * num_stages, [0.0] * num_stages, [-1] * num_stages
    for cut, hop in enumerate(hops):
        if worker_of[cut] != worker_of[cut + 1]:
            there_s[cut], busy_s[cut], media[cut] = hop.there_s, hop.busy_s, hop.medium
    way_free_s = [[0.0] * (max(media) + 1) for _ in orders]
    able = list(range(len(orders)))
    left = sum(map(len, orders))
    while able:
        worker = able.pop()
        order, now_s, ways_s = orders[worker], free_s[worker], way_free_s[worker]
        for kind, stage, micro in order[places[worker] :]:
            at = stage * num_micro + micro
            if kind == 0:
                if stage:
                    come_s = outputs_s[at - num_micro]
                    if come_s == unknown:
                        waiting[True, at - num_micro] = worker
                        break
                    if come_s > now_s:
                        now_s = come_s
                now_s += costs_s[3 * stage]
                cut, sent_s = stage, now_s
                woken = waiting.pop((True, at), None)
            elif kind == 2:
                now_s += costs_s[3 * stage + 2]
                cut, woken = -1, None
            else:
                if stage < num_stages - 1:
                    come_s = gradients_s[at + num_micro]
                    if come_s == unknown:
                        waiting[False, at + num_micro] = worker
                        break
                    if come_s > now_s:
                        now_s = come_s
                now_s += costs_s[3 * stage + 1]
                if kind == 3:
                    now_s += costs_s[3 * stage + 2]
                cut, sent_s = stage - 1, now_s
                woken = waiting.pop((False, at), None)
            if cut >= 0 and (medium := media[cut]) >= 0:
                sent_s = max(sent_s, ways_s[medium])
                ways_s[medium] = sent_s + busy_s[cut]
                sent_s += there_s[cut]
            if kind == 0:
                outputs_s[at] = sent_s
            elif kind != 2:
                gradients_s[at] = sent_s
            places[worker] += 1
            left -= 1
            if woken is not None:
                able.append(woken)
        free_s[worker] = now_s
    if left:
        raise InvalidScheduleError("workers wait for each other")
    return max(free_s)


Coded = tuple[int, int, int]
"""Kind, stage and micro-batch of an action. Kinds: 0 `F`, 1 `I`, 2 `W`, 3 `B`."""
_STORES = (1, 0, -1, -1)
"""By how many pairs of a stage and a micro-batch each kind changes what its worker holds."""


def coded(order: Sequence[Action]) -> list[Coded]:
    """A worker's order in numbers."""
    return [("FIWB".index(action.kind), action.stage, action.micro) for action in order]


def peak_of(order: Sequence[Coded]) -> int:
    """The largest number of (stage, micro-batch) pairs that a worker holds who works in this order."""
    stored = peak = 0
    for kind, _, _ in order:
        stored += _STORES[kind]
        peak = max(peak, stored)
    return peak
