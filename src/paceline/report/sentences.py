"""The result of a run in plain words: how fast, against what, and why not faster."""

from __future__ import annotations

from paceline.records import Layout
from paceline.report import formats
from paceline.report.analysis import (
    Breakdown,
    Comparison,
    Loss,
    Measured,
    break_down,
    compare,
    forecast_and_measured_s,
)
from paceline.report.formats import join, percent, plural, times
from paceline.report.kinds import ForecastsEvent, ForecastTold, ReplanEvent
from paceline.report.reader import RunLog

_WORTH_A_WORD = 0.005
"""Losses of speed-up below this are not worth a word."""


def result(log: RunLog, comparison: Comparison | None = None) -> str:
    """One sentence: how fast the layout trains, against one worker with one thread."""
    comparison = comparison or compare(log)
    chosen, unit = comparison.chosen, comparison.unit
    if log.plan is None:
        return "The run ended before a layout was chosen." if log.end else "No layout has been chosen yet."
    if not log.trials:
        asked = ", as asked for" if log.plan.chosen_by == "user" else ""
        return (
            f"It was trained with {log.plan.label}{asked}. No other layout was timed, "
            "so how much faster this is than one worker is not known."
        )
    if unit is None:
        return (
            f"It was trained with {log.plan.label}. One worker with one thread was not timed, "
            "so how much faster this is than one worker is not known."
        )
    if chosen is None:
        return (
            f"It was trained with {log.plan.label}, which was not timed beside the others, "
            f"so how much faster this is than {unit.label} is not known."
        )
    if chosen is unit:
        return _unit_won(comparison)
    assert chosen.speedup is not None
    verb = "train" if chosen.trial.workers > 1 else "trains"
    return (
        f"{chosen.label} {verb} {times(chosen.speedup.median)} as fast as {unit.label}; "
        f"{chosen.processors}× would be ideal on {plural(chosen.processors, _noun(log))}."
    )


def why_not_more(log: RunLog, comparison: Comparison | None = None) -> str:
    """Where the rest of the ideal speed-up goes; empty where that cannot be known."""
    comparison = comparison or compare(log)
    subject = comparison.chosen
    if subject is not None and subject is comparison.unit:
        subject = _runner_up(comparison)
    if subject is None:
        return ""
    breakdown = break_down(log, comparison, subject)
    if breakdown is None:
        return ""
    told = explain(breakdown)
    if subject is comparison.chosen or subject.speedup is None:
        return told
    return f"{subject.label} reaches {times(subject.speedup.median)} of {subject.processors}×. {told}"


def explain(breakdown: Breakdown) -> str:
    """The missing speed-up, part by part, the largest first."""
    measured, missing = breakdown.measured, breakdown.missing
    if missing < -_WORTH_A_WORD:
        return (
            f"That is {times(-missing)} more than ideal: a smaller part of the batch may fit the caches "
            "better, or the machine was busier while one worker was timed."
        )
    if missing <= _WORTH_A_WORD:
        return "Nothing is missing."
    least = max(_WORTH_A_WORD, 0.04 * missing)
    told = [loss for loss in breakdown.losses if loss.missing >= least]
    told.sort(key=lambda loss: -loss.missing)
    gained = [loss for loss in breakdown.losses if loss.missing <= -least]
    if not any(loss.share is not None for loss in breakdown.losses):
        return f"Why {missing:.2f} is missing is not known: the trials did not time the parts of a step."
    reasons = "; ".join(f"{_reason(loss, measured)} ({loss.missing:.2f})" for loss in told)
    text = f"The missing {missing:.2f}: {reasons}."
    if gained:
        names = join([_NAMES[loss.part] for loss in gained])
        verb = "takes" if len(gained) == 1 else "take"
        back = -sum(loss.missing for loss in gained)
        text += f" {names[0].upper()}{names[1:]} {verb} less than an even share, which gives {back:.2f} back."
    return text


def step_against_forecast(log: RunLog) -> str:
    """`26.8 ms measured, 27.4 ± 2.7 ms forecast (−2 %), 27.0 ms by trial (−1 %)`; without what is not known."""
    by_trial, measured = forecast_and_measured_s(log)
    if measured is None:
        return ""
    told = [f"{formats.seconds(measured)} measured"]
    if log.plan and log.plan.planned_step_s:
        forecast, error = log.plan.planned_step_s, log.plan.planned_error_s or 0.0
        off = formats.signed_percent(measured / forecast - 1)
        told.append(f"{formats.seconds(forecast)} ± {formats.seconds(error)} forecast ({off})")
    if by_trial:
        told.append(
            f"{formats.seconds(by_trial)} by trial ({formats.signed_percent(measured / by_trial - 1)})"
        )
    return ", ".join(told)


def how_forecast(event: ForecastsEvent) -> str:
    """One line: from what, how many, and the fastest."""
    source = (
        f"measured in {formats.seconds(event.measuring_s)}"
        if event.source == "measured"
        else "measured within the last week"
    )
    text = f"{source}: {formats.count(event.possible)} layouts forecast"
    if event.forecasts:
        best = event.forecasts[0]
        text += f", the fastest {name_of(best)} with {formats.seconds(best.step_s)} ± {formats.seconds(best.error_s)}"
    return text


def how_replanned(event: ReplanEvent) -> str:
    """`Step 420: 2 workers × 1 thread took 61 ms, 2.1 times the 29 ms expected: changed to …`, or why it stays."""
    told = f"Step {formats.count(event.step)}: {event.from_label}"
    if event.measured_s and event.expected_s:
        ratio = event.measured_s / event.expected_s
        told += (
            f" took {formats.seconds(event.measured_s)}, {ratio:.2g} times the "
            f"{formats.seconds(event.expected_s)} expected"
        )
    if event.changed:
        now = f" ({formats.seconds(event.step_s)})" if event.step_s else ""
        return f"{told}: changed to {event.to_label}{now}; the change took {formats.seconds(event.change_s)}."
    return f"{told}: it stays, as {event.reason}; finding out took {formats.seconds(event.change_s)}."


def name_of(forecast: ForecastTold) -> str:
    """The text of its layout."""
    return str(Layout.from_json(forecast.layout))


_NAMES = {
    "computation": "computation",
    "communication": "communication",
    "data": "waiting for data",
    "optimizer": "the optimizer",
    "other": "the rest of the step",
}


def _reason(loss: Loss, measured: Measured) -> str:
    share = "an unknown part" if loss.share is None else percent(loss.share)
    if loss.part == "computation" and loss.slower is not None:
        longer = f"{percent(loss.slower)} longer than" if loss.slower < 1 else f"{times(1 + loss.slower)}"
        return (
            f"computation takes {longer} an even share of one worker's, "
            f"usually because {_why_slower(measured)}"
        )
    if loss.part == "communication":
        return f"communication takes {share} of a step, the wait for other workers included"
    if loss.part == "optimizer" and measured.trial.workers > 1:
        return f"the optimizer's update takes {share}: more than its even share"
    return f"{_NAMES[loss.part]} takes {share}"


def _why_slower(measured: Measured) -> str:
    if measured.trial.workers > 1:
        return "workers share caches and memory bandwidth, and smaller batches use a core less well"
    return "only large operations gain from more threads"


def _unit_won(comparison: Comparison) -> str:
    unit, other = comparison.unit, _runner_up(comparison)
    assert unit is not None
    if other is None or other.speedup is None:
        return f"It was trained with {unit.label}; no other layout could be timed."
    others = plural(len(comparison.measured), "layout")
    if other.speedup.median > 1:
        return (
            f"It was trained with {unit.label}; {other.label}, the fastest other layout timed, "
            f"was {times(other.speedup.median)} as fast."
        )
    return (
        f"{unit.label} is the fastest of {others} timed: {other.label}, the next, "
        f"trains {times(other.speedup.median)} as fast."
    )


def _runner_up(comparison: Comparison) -> Measured | None:
    others = [m for m in comparison.measured if m is not comparison.unit]
    return min(others, key=lambda m: m.step_s.median, default=None)


def _noun(log: RunLog) -> str:
    on_cpu = log.run is None or all(host.device == "cpu" for host in log.run.cluster.hosts)
    return "core" if on_cpu else "device"
