"""Playing a pipeline whose workers share their hosts' cores: who waits leaves them to the others."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

from paceline.plan.schedules import InvalidScheduleError, Schedule
from paceline.plan.timeline import Coded, Hop, Span, Timeline, coded, peak_of, simulate

_ROUNDING = 1 + 1e-12


@dataclasses.dataclass(frozen=True)
class Sharing:
    """Which workers of a pipeline share cores, and what that does to them."""

    hosts: tuple[int, ...]
    """Of each worker, a number of its host."""
    rates: tuple[float, ...]
    """Of a worker when one, two, … of its host compute, relative to when all of them do; falling to 1."""
    times: float = 1.0
    """By what to multiply costs that were measured while all of a host computed: what is over within a turn seemed to
    have a core for itself."""

    @property
    def at_once(self) -> float:
        """How many times as much is done as by one worker that computes alone, at most."""
        each = max(count * rate for count, rate in enumerate(self.rates, 1)) / self.rates[0]
        return each * len(set(self.hosts))


def share_cores(
    hosts: Sequence[int], each: int, together: int, cores: int, slowdown: float, times: float = 1.0
) -> Sharing:
    """Of a pipeline's workers.

    Args:
        hosts: of each, a number of its host.
        each: processes that each of them stands for.
        together: processes of a host.
        cores: of a host.
        slowdown: how many times as long everything takes when all processes of a host compute as when one does. In
            between it is a straight line, from as many as there are cores where these are fewer.
        times: as of `Sharing`.
    """
    free = cores if cores < together else 1
    here = max(hosts.count(host) for host in hosts)

    def slower(processes: int) -> float:
        return 1 + (slowdown - 1) * max(0, min(processes, together) - free) / (together - free)

    rates = [max(1.0, slowdown / slower(count * each)) for count in range(1, here + 1)]
    return Sharing(tuple(hosts), (*rates[:-1], 1.0), times)


def play_sharing(
    orders: Sequence[Sequence[Coded]],
    worker_of: Sequence[int],
    num_micro: int,
    costs_s: Sequence[float],
    hops: Sequence[Hop],
    sharing: Sharing,
) -> list[list[tuple[float, float]]]:
    """Of each worker the beginnings and ends of its actions, in their order.

    As `makespan_s`, with `costs_s` of when all workers of a host compute: from each beginning and each end to the next,
    all go on at the rate that the number of those who compute on their host gives them.

    Raises:
        InvalidScheduleError: workers wait for each other.
    """
    return _Play(orders, worker_of, num_micro, costs_s, hops, sharing).run()


def simulate_sharing(
    schedule: Schedule,
    forward_s: Sequence[float],
    input_s: Sequence[float],
    weight_s: Sequence[float],
    hops: Sequence[Hop],
    sharing: Sharing | None,
) -> Timeline:
    """As `simulate`; with `sharing` its workers share cores as in `play_sharing`."""
    if sharing is None:
        return simulate(schedule, forward_s, input_s, weight_s, hops)
    orders = [schedule.actions(worker) for worker in range(schedule.pp)]
    worker_of = [schedule.worker_of(stage) for stage in range(schedule.num_stages)]
    costs_s = [s for of_stage in zip(forward_s, input_s, weight_s, strict=True) for s in of_stage]
    in_numbers = list(map(coded, orders))
    played = play_sharing(in_numbers, worker_of, schedule.num_micro, costs_s, hops, sharing)
    spans = (
        tuple(Span(action, *span) for action, span in zip(order, mine, strict=True))
        for order, mine in zip(orders, played, strict=True)
    )
    return Timeline(tuple(spans), tuple(map(peak_of, in_numbers)))


class _Play:
    def __init__(
        self,
        orders: Sequence[Sequence[Coded]],
        worker_of: Sequence[int],
        num_micro: int,
        costs_s: Sequence[float],
        hops: Sequence[Hop],
        sharing: Sharing,
    ) -> None:
        self._orders, self._worker_of, self._num_micro = orders, worker_of, num_micro
        self._costs_s, self._hops, self._sharing = costs_s, hops, sharing
        self._num_stages = len(worker_of)
        # When the outputs of a stage, and the gradients of its inputs, are where they are needed.
        self._outputs_s, self._gradients_s = ([math.inf] * (self._num_stages * num_micro) for _ in range(2))
        self._way_free_s: dict[tuple[int, int], float] = {}
        self._spans: list[list[tuple[float, float]]] = [[] for _ in orders]

    def run(self) -> list[list[tuple[float, float]]]:
        orders, hosts, rates = self._orders, self._sharing.hosts, self._sharing.rates
        now_s = 0.0
        left_s: dict[int, float] = {}
        begun_s = [0.0] * len(orders)
        idle = {worker for worker, order in enumerate(orders) if order}
        busy_on = [0] * (max(hosts) + 1)
        while idle or left_s:
            next_s = math.inf
            for worker in sorted(idle):
                ready_s = self._ready_s(worker)
                if ready_s <= now_s:
                    idle.remove(worker)
                    left_s[worker], begun_s[worker] = self._cost_s(worker), now_s
                    busy_on[hosts[worker]] += 1
                elif ready_s < next_s:
                    next_s = ready_s
            needs_s = {worker: left / rates[busy_on[hosts[worker]] - 1] for worker, left in left_s.items()}
            step_s = min(needs_s.values(), default=math.inf)
            if next_s - now_s < step_s:
                for worker, need_s in needs_s.items():
                    left_s[worker] *= 1 - (next_s - now_s) / need_s
                now_s = next_s
                continue
            if step_s == math.inf:
                raise InvalidScheduleError("workers wait for each other")
            now_s += step_s
            for worker, need_s in needs_s.items():
                if need_s > step_s * _ROUNDING:
                    left_s[worker] *= 1 - step_s / need_s
                    continue
                del left_s[worker]
                busy_on[hosts[worker]] -= 1
                self._end(worker, begun_s[worker], now_s)
                if len(self._spans[worker]) < len(orders[worker]):
                    idle.add(worker)
        return self._spans

    def _next(self, worker: int) -> Coded:
        return self._orders[worker][len(self._spans[worker])]

    def _cost_s(self, worker: int) -> float:
        kind, stage, _ = self._next(worker)
        if kind == 3:
            return self._costs_s[3 * stage + 1] + self._costs_s[3 * stage + 2]
        return self._costs_s[3 * stage + kind]

    def _ready_s(self, worker: int) -> float:
        """When what a worker's next action needs is there; endless where nobody knows yet."""
        kind, stage, micro = self._next(worker)
        at = stage * self._num_micro + micro
        if kind == 0:
            return self._outputs_s[at - self._num_micro] if stage else 0.0
        if kind == 2 or stage == self._num_stages - 1:
            return 0.0
        return self._gradients_s[at + self._num_micro]

    def _end(self, worker: int, begin_s: float, end_s: float) -> None:
        """Of the action that a worker has begun: what it has made is sent."""
        kind, stage, micro = self._next(worker)
        self._spans[worker].append((begin_s, end_s))
        if kind == 2:
            return
        cut = stage if kind == 0 else stage - 1
        there_s = end_s
        if 0 <= cut < len(self._hops) and self._worker_of[cut] != self._worker_of[cut + 1]:
            hop = self._hops[cut]
            way = worker, hop.medium
            sent_s = max(end_s, self._way_free_s.get(way, 0.0))
            self._way_free_s[way] = sent_s + hop.busy_s
            there_s = sent_s + hop.there_s
        made_s = self._outputs_s if kind == 0 else self._gradients_s
        made_s[stage * self._num_micro + micro] = there_s
