"""The pipelines of one job on one cluster: what crosses their cuts, who shares cores, and how long they take."""

from __future__ import annotations

from typing import Any

from paceline.plan.orders import orders, workers_of_stages
from paceline.plan.places import Places
from paceline.plan.profile import Costs, Profile
from paceline.plan.sending import Sending, sending
from paceline.plan.sharing import Sharing, play_sharing, share_cores
from paceline.plan.stages import Stage
from paceline.plan.timeline import makespan_s
from paceline.records import Layout

_SLOWED = 1.3
"""Workers of a host that all compute at once, each for so many times as long as one alone, wait for each other's cores;
those that are slowed down less, for memory: who waits then leaves little to the others."""


class Pipelines:
    """What several layouts have in common is found once."""

    def __init__(self, profile: Profile, places: Places) -> None:
        self._profile, self._places = profile, places
        self._played: dict[Any, tuple[float, tuple[float, ...]]] = {}
        self._sent: dict[Any, Sending] = {}
        self._sharing: dict[Any, Sharing | None] = {}

    def play(
        self, layout: Layout, stages: tuple[Stage, ...], sends: Sending, sharing: Sharing | None
    ) -> tuple[float, tuple[float, ...]]:
        """Seconds of a pipeline's step, up to the last gradients of the last pipeline; and those in which each worker
        computes, where it depends on the others how long it takes for that."""
        key = (layout.schedule, layout.pp, layout.micro, layout.stages, stages, sends, sharing)
        if key not in self._played:
            order, worker_of = orders(layout.schedule, layout.pp, layout.micro, layout.stages)
            costs_s = [seconds for s in stages for seconds in (s.forward_s, s.input_s, s.weight_s)]
            given = order, worker_of, layout.micro, costs_s, sends.hops
            if sharing is None:
                self._played[key] = makespan_s(*given) + sends.behind_s, ()
            else:
                spans = play_sharing(*given, sharing)
                worked_s = tuple(sum(end_s - begin_s for begin_s, end_s in mine) for mine in spans)
                self._played[key] = max(mine[-1][1] for mine in spans) + sends.behind_s, worked_s
        return self._played[key]

    def sending(self, layout: Layout, stages: tuple[Stage, ...]) -> Sending:
        """What crosses the cuts between these stages."""
        key = (layout.schedule, layout.pp, layout.stages, layout.workers, layout.tp, stages)
        if key not in self._sent:
            worker_of = workers_of_stages(layout.schedule, layout.pp, layout.stages)
            self._sent[key] = sending(self._places, layout, stages, worker_of)
        return self._sent[key]

    def sharing(self, layout: Layout, costs: Costs, samples: float) -> Sharing | None:
        """How its workers share cores; None where those of a host have the same stages, or enough cores, or GPUs.

        Args:
            costs: of the layout, with as many processes of a host at once as it has.
            samples: of a micro-batch.
        """
        profile, linked = self._profile, self._places.linked
        inner, here = layout.workers // layout.pp, min(layout.workers, linked.per_host)
        if layout.pp == 1 or inner >= here or profile.device != "cpu":
            return None
        key = layout.threads, here, layout.pp, inner, samples
        if key not in self._sharing:
            found, short = None, profile.slowdown(costs, samples)
            slowdown = max(short, profile.slowdown(costs, profile.batch_size))
            if slowdown >= _SLOWED and short > 0:
                hosts = [self._places.host_of(at * inner) for at in range(layout.pp)]
                cores = linked.cluster.hosts[0].cores
                found = share_cores(hosts, inner, here, cores, slowdown, slowdown / short)
            self._sharing[key] = found
        return self._sharing[key]
