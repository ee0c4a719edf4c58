"""What eats the ideal: of the time of so many workers, what each cause takes away."""

from __future__ import annotations

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.scaling import Point, ScalingCurve
from paceline.plan.schedules import make_schedule
from paceline.plan.terms import Forecast

CAUSES = (
    "small batches",
    "uneven stages",
    "slower computation",
    "communication",
    "bubbles",
    "fixed costs",
    "unexplained",
)
"""Small batches: what a sample takes more in the smaller micro-batches that are left for each worker. Uneven stages:
what the busiest worker of a pipeline computes more than the average one. Slower computation: what it takes more for
other reasons, such as computing again, and workers that share memory. Fixed costs: the optimizer, reading the data,
running a pipeline's actions, and what every step costs, as far as they do not shrink with the number of workers.
Unexplained: what a timed step of this way of splitting took beyond the sum of its parts."""
_OF_TERM = {
    "compute_s": "slower computation",
    "tensor_s": "communication",
    "messages_s": "communication",
    "gather_s": "communication",
    "gradients_s": "communication",
    "bubble_s": "bubbles",
    "unexplained_s": "unexplained",
}


def losses(forecaster: Forecaster, curve: ScalingCurve) -> tuple[dict[str, float], ...]:
    """Of each point of the curve: by cause, the share of its workers' time that is lost.

    With the point's efficiency they add up to 1. Where one thing takes less than its ideal share, that is taken off
    the others; where workers are more than ideal, nothing is lost.
    """
    return tuple(_of_point(forecaster, curve.points[0], point) for point in curve.points)


def _of_point(forecaster: Forecaster, alone: Point, point: Point) -> dict[str, float]:
    lost_s = dict.fromkeys(CAUSES, 0.0)
    for term, seconds in point.eaten_s.items():
        lost_s[_OF_TERM.get(term, "fixed costs")] += seconds
    share = alone.workers / point.workers
    uneven_s = _uneven_s(forecaster, point.forecast) - share * _uneven_s(forecaster, alone.forecast)
    small_s = share * _small_batches_s(forecaster, alone.forecast, point.forecast)
    for cause, seconds in (("uneven stages", uneven_s), ("small batches", small_s)):
        known_s = min(max(0.0, seconds), max(0.0, lost_s["slower computation"]))
        lost_s[cause] += known_s
        lost_s["slower computation"] -= known_s
    whole_s = sum(lost_s.values())
    if whole_s <= 0:
        return dict.fromkeys(CAUSES, 0.0)
    positive_s = sum(seconds for seconds in lost_s.values() if seconds > 0)
    scale = whole_s / positive_s / point.forecast.step_s
    return {cause: max(0.0, seconds) * scale for cause, seconds in lost_s.items()}


def _uneven_s(forecaster: Forecaster, forecast: Forecast) -> float:
    """What the busiest worker of a pipeline computes longer than the average one."""
    layout = forecast.layout
    if layout.pp == 1:
        return 0.0
    stages = forecaster.parts(layout).stages
    schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
    computed_s = [
        layout.micro
        * sum(
            stages[s].busy_s - stages[s].tensor_s - stages[s].overhead_s for s in schedule.stages_of(worker)
        )
        for worker in range(layout.pp)
    ]
    return max(computed_s) - sum(computed_s) / layout.pp


def _small_batches_s(forecaster: Forecaster, alone: Forecast, several: Forecast) -> float:
    """How much longer the fewest workers would compute with the micro-batches of a point."""
    first, now = alone.layout, several.layout
    parts = now.data_parallel * now.micro
    if parts % first.data_parallel:
        return 0.0
    try:
        as_small = forecaster.forecast(first.model_copy(update={"micro": parts // first.data_parallel}))
    except LayoutError:
        return 0.0
    return as_small.terms.compute_s - alone.terms.compute_s
