"""All that `paceline plan` tells, in one record: what pictures, page and JSON are made of."""

from __future__ import annotations

import dataclasses
from typing import Any

from paceline.plan.advice import Advice, advise
from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.forecast import Forecaster
from paceline.plan.goal import GoalCurve
from paceline.plan.losses import losses
from paceline.plan.profile import LinkedCluster
from paceline.plan.scaling import ScalingCurve
from paceline.plan.search import Found
from paceline.plan.spans import StepTimeline, step_timeline
from paceline.plan.traffic import Traffic


@dataclasses.dataclass(frozen=True)
class Planned:
    """A plan for one job on one cluster."""

    job: str
    batch_size: int
    linked: LinkedCluster
    found: Found
    curve: ScalingCurve
    losses: tuple[dict[str, float], ...]
    """Of each point of the curve, as `paceline.plan.losses` tells."""
    timeline: StepTimeline
    """Of the fastest layout."""
    advice: Advice
    goal: GoalCurve | None = None
    """Time and cost to a target, where they were asked for."""
    noise_source: str = ""
    """Where the goal's noise scale is from."""
    sent_bytes: tuple[float, ...] = ()
    """Of each of the fastest layouts: what a host sends to others in a step; empty on one host."""

    def to_json(self) -> dict[str, Any]:
        """What `plan.json` holds."""
        told: dict[str, Any] = {
            "layouts": [forecast.to_json() for forecast in self.found.fastest],
            "curve": self.curve.to_json(),
            "losses": [
                {"workers": point.workers, "efficiency": point.efficiency, **lost}
                for point, lost in zip(self.curve.points, self.losses, strict=True)
            ],
            "timeline": self.timeline.to_json(),
            "advice": self.advice.to_json(),
        }
        winner = self.found.fastest[0]
        for layout, forecast in zip(told["layouts"], self.found.fastest, strict=True):
            layout["limited_by"] = limited_by(forecast)
            if forecast is not winner:
                layout["why_it_lost"] = why_it_lost(forecast, winner)
        for layout, sent in zip(told["layouts"], self.sent_bytes, strict=False):
            layout["sent_bytes"] = sent
        if self.found.smallest is not None:
            told["refused"] = {
                "layout": self.found.smallest.layout.to_json(),
                "needed_bytes": self.found.smallest.needed_bytes,
                "room_bytes": self.found.smallest.room_bytes,
            }
        if self.goal is not None:
            told["goal"] = {**self.goal.to_json(), "noise_source": self.noise_source}
        return told


def planned(
    forecaster: Forecaster,
    found: Found,
    curve: ScalingCurve,
    *,
    job: str | None = None,
    memory_bytes: int | None = None,
) -> Planned:
    """What a search and a curve of `forecaster` come to.

    Args:
        job: what the job is called; None: as its profile says.
        memory_bytes: what a worker may use, as they were given it.
    """
    lost = losses(forecaster, curve)
    sent: tuple[float, ...] = ()
    if len(forecaster.linked.cluster.hosts) > 1:
        traffic = Traffic(forecaster.profile, forecaster.linked)
        sent = tuple(traffic.sent_bytes(forecast.layout) for forecast in found.fastest)
    return Planned(
        job=job or forecaster.profile.job,
        batch_size=forecaster.profile.batch_size,
        linked=forecaster.linked,
        found=found,
        curve=curve,
        losses=lost,
        timeline=step_timeline(forecaster, found.fastest[0].layout),
        sent_bytes=sent,
        advice=advise(forecaster, found, curve, lost, memory_bytes=memory_bytes),
    )
