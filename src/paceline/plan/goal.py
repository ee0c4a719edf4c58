"""Time to a target: how fast steps are, times how many are needed with batches of one size.

McCandlish et al. 2018, "An empirical model of large-batch training": with the gradient noise scale N, batches of B
samples reach a target in

    S = S_min (1 + N/B) steps,    on    E = B S = E_min (1 + B/N) samples,    E_min = N S_min.

The smallest batches need fewest samples, the largest fewest steps; with B = N, the critical batch size, both are twice
their least. `E_min / E` is the statistical efficiency of the samples; the time to the target is the step's time times
S, and throughput times statistical efficiency is its inverse (the goodput of Qiao et al. 2021). S_min is not known, so
times are told relative to each other. It is taken for granted that the learning rate is fit for each batch size, and
that N stays what it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from pydantic import Field

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import LinkedCluster, Profile
from paceline.plan.scaling import worker_counts
from paceline.plan.search import search
from paceline.plan.terms import Forecast
from paceline.records import Layout, Record

_SMALLEST, _LARGEST = 1 / 16, 16.0
"""Batches that are tried, relative to the noise scale and to the job's batch: beyond, N/B or B/N is below 7 %."""


def steps_needed(batch_size: float, noise_scale: float) -> float:
    """S / S_min."""
    return 1 + noise_scale / batch_size


def samples_needed(batch_size: float, noise_scale: float) -> float:
    """E / E_min."""
    return 1 + batch_size / noise_scale


class Choice(Record):
    """One batch size on so many workers, in the layout that is fastest with it."""

    forecast: Forecast
    """Of a step; its `samples` are the batch size."""
    time: float = Field(gt=0)
    """To the target; 1 is what the fewest workers take with the job's own batch size."""
    time_error: float = Field(ge=0)
    """How far it may be from that, as both forecasts err by themselves."""
    efficiency: float | None
    """E_min / E; None where no noise scale is known."""
    is_beyond: bool
    """Blocks take samples that are fewer or more than what was measured: the forecast goes on in a straight line."""


class GoalPoint(Record):
    """So many workers."""

    workers: int
    best: Choice
    """With the least time, of those within what was measured, if any is; on so many workers it is the cheapest, too."""
    cost: float = Field(gt=0)
    """Worker-seconds to the target with `best`; 1 is what the fewest workers take with the job's own batch size."""
    price_per_million: float | None
    """Of a million samples, with `best`; None without a price."""
    choices: tuple[Choice, ...]
    """By batch size, ascending."""


class GoalCurve(Record):
    """Of one job on one cluster."""

    noise_scale: float | None
    batch_size: int
    """The job's own."""
    price_per_worker_hour: float | None
    points: tuple[GoalPoint, ...]
    """By number of workers, ascending."""
    fastest: int
    """The number of workers with the least time."""
    cheapest: int
    """The number of workers with the least cost."""

    def at(self, workers: int) -> GoalPoint:
        """The point of so many workers, which is there."""
        return next(point for point in self.points if point.workers == workers)


def time_to_goal(
    profile: Profile,
    linked: LinkedCluster,
    noise_scale: float | None,
    *,
    price_per_worker_hour: float | None = None,
    workers: Sequence[int] | None = None,
    batch_sizes: Sequence[int] | None = None,
    memory_bytes: int | None = None,
    margin: float | None = None,
) -> GoalCurve:
    """The best batch size for each of several numbers of workers, and what it brings.

    Args:
        noise_scale: in samples, above 0; None: not known, and only the job's own batch size is looked at.
        workers: the numbers; None: as `scaling`.
        batch_sizes: to choose among; None: the job's own, halved and doubled. The job's own is always among them.

    Raises:
        LayoutError: the job fits none of the numbers of workers.
    """
    own = profile.batch_size
    if noise_scale is None:
        sizes = [own]
    else:
        sizes = sorted({own, *(batch_sizes if batch_sizes is not None else _grid(own, noise_scale))})
    found: dict[int, list[tuple[Forecast, bool]]] = {}
    failure: LayoutError | None = None
    for size in sizes:
        sized = profile.model_copy(update={"batch_size": size})
        forecasters = _WithinMeasured(sized, linked), Forecaster(sized, linked)
        for number in workers or worker_counts(linked.cluster.workers):
            try:
                best = _fastest(forecasters, number, memory_bytes, margin)
            except LayoutError as error:
                failure = failure or error
            else:
                found.setdefault(number, []).append(best)
    if not found:
        assert failure is not None
        raise failure
    fewest = min(found)
    unit = _unit(found[fewest], own)
    points = []
    for number, forecasts in sorted(found.items()):
        choices = tuple(
            Choice(
                forecast=forecast,
                time=_goal_s(forecast, noise_scale) / _goal_s(unit, noise_scale),
                time_error=_time_error(forecast, unit, noise_scale),
                efficiency=None if noise_scale is None else 1 / samples_needed(forecast.samples, noise_scale),
                is_beyond=is_beyond,
            )
            for forecast, is_beyond in forecasts
        )
        points.append(_point(number, choices, number / fewest, price_per_worker_hour))
    return GoalCurve(
        noise_scale=noise_scale,
        batch_size=own,
        price_per_worker_hour=price_per_worker_hour,
        points=tuple(points),
        fastest=min(points, key=lambda point: (point.best.time, point.workers)).workers,
        cheapest=min(points, key=lambda point: (point.cost, point.workers)).workers,
    )


def _point(workers: int, choices: tuple[Choice, ...], share: float, price: float | None) -> GoalPoint:
    best = min(choices, key=lambda choice: (choice.is_beyond, choice.time))
    sample_s = best.forecast.step_s / best.forecast.samples
    return GoalPoint(
        workers=workers,
        best=best,
        cost=share * best.time,
        price_per_million=None if price is None else price / 3600 * workers * sample_s * 1e6,
        choices=choices,
    )


def _goal_s(forecast: Forecast, noise_scale: float | None) -> float:
    """Seconds to the target over S_min; where no noise scale is known, of a sample."""
    if noise_scale is None:
        return forecast.step_s / forecast.samples
    return forecast.step_s * steps_needed(forecast.samples, noise_scale)


def _unit(found: Sequence[tuple[Forecast, bool]], own: int) -> Forecast:
    """Of the job's own batch size, or where that does not fit the one next to it: it takes a time of 1."""
    return min(found, key=lambda pair: abs(pair[0].samples - own))[0]


def _time_error(forecast: Forecast, unit: Forecast, noise_scale: float | None) -> float:
    if forecast is unit:
        return 0.0
    relative = math.hypot(forecast.error_s / forecast.step_s, unit.error_s / unit.step_s)
    return relative * _goal_s(forecast, noise_scale) / _goal_s(unit, noise_scale)


class _WithinMeasured(Forecaster):
    """Refuses layouts whose micro-batches are smaller or larger than those of which blocks were measured."""

    def check(self, layout: Layout) -> None:
        super().check(layout)
        micro = self.micro_samples(layout)
        for block in self.costs_of(layout).blocks:
            part = block.divided(layout.tp)
            assert part is not None
            for curve in (part.forward_s, part.backward_s):
                least, most = curve.points[0][0], curve.points[-1][0]
                # What begins at no samples was not measured, but written down as a line.
                if least > 0 and not least <= micro <= most:
                    raise LayoutError(
                        f"layout {layout} computes {micro:g} samples at once, and {least:g} to {most:g} were measured",
                        next_step="use another micro, or another batch size",
                    )


def _fastest(
    forecasters: Sequence[Forecaster], workers: int, memory_bytes: int | None, margin: float | None
) -> tuple[Forecast, bool]:
    """Of so many workers; the second forecaster is asked where the first finds nothing, and whether it was is told."""
    within, anyhow = forecasters
    options: dict[str, Any] = {
        "number": 1,
        "workers": workers,
        "memory_bytes": memory_bytes,
        "margin": margin,
    }
    try:
        return search(within, **options).fastest[0], False
    except LayoutError:
        return search(anyhow, **options).fastest[0], True


def _grid(own: int, noise_scale: float) -> list[int]:
    """The job's batch size, halved as long as it is even and doubled."""
    least, most = _SMALLEST * min(own, noise_scale), _LARGEST * max(own, noise_scale)
    sizes = [own]
    while sizes[0] % 2 == 0 and sizes[0] / 2 >= least:
        sizes.insert(0, sizes[0] // 2)
    while sizes[-1] * 2 <= most:
        sizes.append(sizes[-1] * 2)
    return sizes
