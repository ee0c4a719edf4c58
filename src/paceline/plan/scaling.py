"""What more processors bring: the speed-up curve, its knee, and where it turns."""

from __future__ import annotations

import math
from collections.abc import Sequence

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.search import FEW, search
from paceline.plan.terms import Forecast
from paceline.records import Record

LEAST_SHARE = 0.5
"""Of what an ideal further worker would bring: the knee is where the next one brings less."""


class Point(Record):
    """The fastest layout of so many workers."""

    workers: int
    forecast: Forecast
    speedup: float
    """Over the fewest workers that the job fits; those count for as many as they are."""
    speedup_error: float
    """How far it may be from that, as both forecasts err by themselves; 0 of the fewest workers."""
    eaten_s: dict[str, float]
    """Where the ideal went: seconds of a step above what these workers would take if nothing were lost."""

    @property
    def efficiency(self) -> float:
        return self.speedup / self.workers


class ScalingCurve(Record):
    """Of one job on one cluster."""

    points: tuple[Point, ...]
    """By number of workers, ascending; numbers on which the job does not fit, or cannot be divided, are left out."""
    least_share: float
    knee: int
    """After so many workers the next brings less than `least_share` of an ideal one."""
    turn: int
    """The number of workers with the fastest step: more are slower."""


def scaling(
    forecaster: Forecaster,
    *,
    workers: Sequence[int] | None = None,
    memory_bytes: int | None = None,
    margin: float | None = None,
    least_share: float = LEAST_SHARE,
) -> ScalingCurve:
    """The fastest step with each of several numbers of workers.

    Args:
        workers: the numbers; None: all up to 16, and doublings up to what the cluster has.

    Raises:
        LayoutError: the job fits none of them.
    """
    found: list[tuple[int, Forecast]] = []
    failure: LayoutError | None = None
    for number in workers or worker_counts(forecaster.linked.cluster.workers):
        try:
            (best,) = search(
                forecaster, number=1, workers=number, memory_bytes=memory_bytes, margin=margin
            ).fastest
        except LayoutError as error:
            failure = failure or error
            continue
        found.append((number, best))
    if not found:
        assert failure is not None
        raise failure
    first, alone = found[0]
    points = tuple(
        Point(
            workers=number,
            forecast=best,
            speedup=first * alone.step_s / best.step_s,
            speedup_error=0.0 if number == first else _ratio_error(alone, best) * first,
            eaten_s=_eaten(alone, best, first / number),
        )
        for number, best in found
    )
    return ScalingCurve(
        points=points,
        least_share=least_share,
        knee=find_knee([p.workers for p in points], [p.speedup for p in points], least_share),
        turn=max(points, key=lambda p: (p.speedup, -p.workers)).workers,
    )


def find_knee(workers: Sequence[int], speedups: Sequence[float], least_share: float) -> int:
    """The first number after which no further worker, up to the end of the curve, brings `least_share` of an ideal one.

    An ideal worker would add what each of those before it has brought: the speed-up divided by their number. A dent in
    the curve, as where a batch cannot be divided well, is no knee: what comes after it is looked at too.
    """
    for at, (number, speedup) in enumerate(zip(workers, speedups, strict=True)):
        ideal = speedup / number
        later = list(zip(workers, speedups, strict=True))[at + 1 :]
        if all((s - speedup) / (n - number) < least_share * ideal for n, s in later):
            return number
    return workers[-1]


def _ratio_error(alone: Forecast, several: Forecast) -> float:
    """Of one step over the other."""
    relative = math.hypot(alone.error_s / alone.step_s, several.error_s / several.step_s)
    return relative * alone.step_s / several.step_s


def _eaten(alone: Forecast, several: Forecast, share: float) -> dict[str, float]:
    """By term: what it takes above its ideal share of what fewest workers take."""
    names = type(alone.terms).model_fields
    lost = {name: getattr(several.terms, name) - share * getattr(alone.terms, name) for name in names}
    return {name: seconds for name, seconds in lost.items() if abs(seconds) > 1e-12}


def worker_counts(most: int) -> list[int]:
    """All numbers up to 16, and doublings up to `most`."""
    numbers = list(range(1, min(most, FEW) + 1))
    while numbers[-1] * 2 <= most:
        numbers.append(numbers[-1] * 2)
    return numbers if numbers[-1] == most else [*numbers, most]
