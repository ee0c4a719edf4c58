"""What ways of splitting cost beyond the sum of their parts, taken from one step of each that was timed.

Blocks, links and the optimizer are measured apart. Run together they cost more: a pipeline's worker runs the code
around its blocks for every action, sharding gathers and frees, caches are shared. So of each way of splitting one
layout is tried, and what its step takes beyond its forecast is added to the forecasts of all that split in that way.
Likewise what its workers hold.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.plan.forecast import Forecaster
from paceline.plan.profile import PIPELINE, LinkedCluster, Profile, Tried
from paceline.plan.ways import size_of, ways_of

_HALVINGS = 40


def corrected(profile: Profile, linked: LinkedCluster, tried: Sequence[Tried]) -> Profile:
    """The profile with what was tried, and what that tells.

    Args:
        linked: the cluster on which the profile was measured and the layouts were tried.
        tried: of each way of splitting one layout, which splits in no other way; of pipelines two, with few and with
            many micro-batches.
    """
    nothing = {
        "action_s": 0.0,
        "unexplained_s": {},
        "unexplained_bytes": {},
        "unexplained_evaluation_bytes": {},
        "tried_workers": {},
    }
    found = profile.model_copy(update={"tried": tuple(tried), **nothing})
    unexplained_s: dict[str, float] = {}
    more_bytes: dict[str, dict[str, float]] = {
        "unexplained_bytes": {},
        "unexplained_evaluation_bytes": {},
    }
    tried_workers: dict[str, int] = {}
    action_s = 0.0
    for one in tried:
        layout = one.layout
        ways = ways_of(layout)
        if len(ways) != 1:
            continue
        (way,) = ways
        tried_workers[way] = size_of(layout, way)
        forecaster = Forecaster(found, linked)
        foreseen = forecaster.forecast(layout)
        held = zip(
            more_bytes.values(),
            (one.peak_bytes, one.evaluation_peak_bytes),
            forecaster.memories(layout),
            strict=True,
        )
        for found_bytes, peak_bytes, memory in held:
            if peak_bytes is not None:
                more = peak_bytes - memory.total
                found_bytes[way] = max(more, found_bytes.get(way, more))
        if way != PIPELINE:
            # In seconds of the device that was measured: slower hosts pay more.
            missing_s = (one.step_s - foreseen.step_s) * linked.slowest(layout.workers)
            unexplained_s[way] = missing_s / forecaster.times_of(layout, way)
    pipelines = [one for one in tried if ways_of(one.layout) == (PIPELINE,)]
    if pipelines:
        few, many = (pick(pipelines, key=lambda one: one.layout.micro) for pick in (min, max))
        action_s, missing_s = _of_pipelines(found, linked, few, many)
        if missing_s:
            unexplained_s[PIPELINE] = missing_s * linked.slowest(few.layout.workers)
    seconds = {"action_s": action_s, "unexplained_s": unexplained_s, "tried_workers": tried_workers}
    return found.model_copy(update={**seconds, **more_bytes})


def _of_pipelines(profile: Profile, linked: LinkedCluster, few: Tried, many: Tried) -> tuple[float, float]:
    """What each action of a pipeline takes beside its blocks, and each step beside that.

    Args:
        few, many: with few and with many micro-batches, else alike; the same, where only one was tried: then all is
            each action's, unless a step took less than its forecast.
    """

    def forecast_s(one: Tried, action_s: float) -> float:
        told = Forecaster(profile.model_copy(update={"action_s": action_s}), linked).forecast(one.layout)
        return told.step_s

    def missing_s(action_s: float) -> float:
        """Of what many micro-batches took more than few; or of all, where there is only one."""
        if few is many:
            return one_s(many, action_s)
        return one_s(many, action_s) - one_s(few, action_s)

    def one_s(one: Tried, action_s: float) -> float:
        return one.step_s - forecast_s(one, action_s)

    low, high = 0.0, many.step_s
    if missing_s(0.0) <= 0:
        high = 0.0
    for _ in range(_HALVINGS if high else 0):
        middle = (low + high) / 2
        low, high = (middle, high) if missing_s(middle) > 0 else (low, middle)
    action_s = (low + high) / 2
    if few is many:
        return action_s, 0.0 if action_s else one_s(many, 0.0)
    return action_s, (one_s(few, action_s) + one_s(many, action_s)) / 2
