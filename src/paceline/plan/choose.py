"""Taking the fastest of the timed layouts, and saying why."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median

from paceline.errors import LayoutError
from paceline.plan.fitting import by_turns, why_not
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import LinkedCluster, Profile
from paceline.plan.search import search
from paceline.plan.terms import Forecast
from paceline.records import Layout, Plan, Trial

LEAST_GAIN = 0.02
"""Share of a step's time that several workers must save over one process, or one process is taken."""
_LEVEL = 0.05
"""Share of a step's time up to which two layouts are level, where one is not slower in all rounds."""
_FORECASTS = 30
"""Layouts that a shortlist is made of."""


class JobForecasts:
    """The forecasts of one job on one cluster, the fastest first."""

    def __init__(self, profile: Profile, linked: LinkedCluster) -> None:
        self.forecaster = Forecaster(profile, linked)
        self.found = search(self.forecaster, number=_FORECASTS)

    def of(self, layout: Layout) -> Forecast:
        """The forecast of one layout."""
        return self.forecaster.forecast(layout)

    def why_not(self, layout: Layout) -> str:
        """Why a layout would not fit; empty if it would."""
        return why_not(self.forecaster, layout)

    def by_turns(self, layouts: Sequence[Layout]) -> list[list[Layout]]:
        """The layouts in groups whose models can all be in memory at the same time."""
        return by_turns(self.forecaster, layouts)

    def steps_s(self, trials: Sequence[Trial]) -> dict[Layout, float]:
        """Forecast seconds of a step of the layouts that were timed."""
        return {t.layout: self.of(t.layout).step_s for t in trials if t.step_s}


def choose(trials: Sequence[Trial], forecast_s: Mapping[Layout, float] | None = None) -> Plan:
    """The plan that takes the fastest layout; of those that a trial cannot tell apart, that with the least forecast.

    Layouts that were timed in interleaved rounds are compared round by round, others, which memory had no room for
    together, by the medians of their rounds (`compare`). Several workers are taken only where they save at least
    `LEAST_GAIN` of the time of the fastest single process; never one that is slower than it.

    Raises:
        LayoutError: no layout could be timed; the reasons are listed.
    """
    timed = [t for t in trials if t.step_s]
    if not timed:
        reasons = "; ".join(f"{t.label}: {t.error}" for t in trials)
        raise LayoutError(
            f"none of {len(trials)} layouts could be timed: {reasons}",
            cause="the job fails on the first steps",
            next_step="run it with --layout dp_replicate=1 to see the error",
        )
    best = _fastest(timed, forecast_s or {})
    singles = [t for t in timed if t.workers == 1]
    if singles and best.workers > 1:
        single = min(singles, key=lambda t: median(t.step_s))
        ratio, _ = compare(best, single)
        if ratio > 1 - LEAST_GAIN:
            reason = (
                f"{best.label} would take {ratio:.2f} of the step time of {single.label}: "
                f"less than {LEAST_GAIN:.0%} gained, so one process it is."
            )
            return _plan(single, reason, trials)
        reason = (
            f"{best.label} trains {1 / ratio:.2f}× as fast as the fastest single process ({single.label})."
        )
        return _plan(best, reason, trials)
    others = [t for t in timed if t is not best]
    if not others:
        return _plan(
            best, "It is the only layout that was timed: no other is possible here, or worth a trial.", trials
        )
    second = min(others, key=lambda t: median(t.step_s))
    several = [t for t in others if t.workers > 1]
    ratio, _ = compare(second, best)
    reason = f"{best.label} is fastest: {second.label} takes {ratio:.2f}× its step time."
    if ratio < 1:
        reason = (
            f"{best.label} and {second.label} are level in the trial; by the forecast the first is faster."
        )
    if several and best.workers == 1:
        reason += " Splitting the batch over workers does not pay for this job here."
    return _plan(best, reason, trials)


def _fastest(timed: Sequence[Trial], forecast_s: Mapping[Layout, float]) -> Trial:
    best = min(timed, key=lambda t: median(t.step_s))
    if best.layout not in forecast_s:
        return best
    level = [best]
    for other in timed:
        is_level = other.group == best.group and min(_ratios(other, best)) < 1
        if other.layout in forecast_s and is_level and compare(other, best)[0] <= 1 + _LEVEL:
            level.append(other)
    return min(level, key=lambda t: forecast_s[t.layout])


def without_workers(plan: Plan, why: str) -> Plan:
    """The fastest single process of the plan's trials instead, because of `why`."""
    single = min((t for t in plan.trials if t.workers == 1 and t.step_s), key=lambda t: median(t.step_s))
    return _plan(single, f"{single.label}, as {why}.", plan.trials)


def compare(a: Trial, b: Trial) -> tuple[float, float]:
    """a's step time over b's, and the noise of that: the median of the rounds' ratios, and of their deviations from it.

    Of trials that were not timed by turns, the ratio of their medians; their rounds' deviations add up as squares.
    """
    if a.group == b.group:
        return _middle(_ratios(a, b))
    (a_s, a_noise), (b_s, b_noise) = _middle(a.step_s), _middle(b.step_s)
    return a_s / b_s, a_s / b_s * math.hypot(a_noise / a_s, b_noise / b_s)


def _ratios(a: Trial, b: Trial) -> list[float]:
    """Round by round."""
    return [x / y for x, y in zip(a.step_s, b.step_s, strict=False)]


def _middle(values: Sequence[float]) -> tuple[float, float]:
    """The median, and the median deviation from it."""
    middle = median(values)
    return middle, median(abs(value - middle) for value in values)


def _plan(taken: Trial, reason: str, trials: Sequence[Trial]) -> Plan:
    return Plan(
        layout=taken.layout,
        label=taken.label,
        reason=reason,
        chosen_by="trial",
        forecast_step_s=median(taken.step_s),
        trials=tuple(trials),
    )
