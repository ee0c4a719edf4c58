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
        tried: of each way of splitting one layout, which splits in no other way.
    """
    nothing = {"action_s": 0.0, "unexplained_s": {}, "unexplained_bytes": {}, "tried_workers": {}}
    found = profile.model_copy(update={"tried": tuple(tried), **nothing})
    unexplained_s: dict[str, float] = {}
    unexplained_bytes: dict[str, float] = {}
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
        missing_s = one.step_s - foreseen.step_s
        if one.peak_bytes is not None:
            unexplained_bytes[way] = one.peak_bytes - foreseen.memory.total
        if way == PIPELINE and missing_s > 0:
            action_s = _action_s(found, linked, one)
            continue
        # In seconds of the device that was measured: slower hosts pay more.
        unexplained_s[way] = missing_s * linked.slowest(layout.workers) / forecaster.times_of(layout, way)
    seconds = {"action_s": action_s, "unexplained_s": unexplained_s, "tried_workers": tried_workers}
    return found.model_copy(update={**seconds, "unexplained_bytes": unexplained_bytes})


def _action_s(profile: Profile, linked: LinkedCluster, tried: Tried) -> float:
    """What each action must take beside its blocks for the forecast to be what was measured."""
    low, high = 0.0, tried.step_s
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        told = Forecaster(profile.model_copy(update={"action_s": middle}), linked).forecast(tried.layout)
        low, high = (middle, high) if told.step_s < tried.step_s else (low, middle)
    return (low + high) / 2
