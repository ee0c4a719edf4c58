"""The speed-up curve, predicted and measured: where the knee is, where it turns, whether N workers are slower than one.

    python benchmarks/knee.py --results build/cells --out knee.md      # 12 curves of 1 to 8 workers; needs root
    python benchmarks/knee.py --jobs conv --boxes eight-1g
    python benchmarks/knee.py --from build/cells                       # the tables again, from the files

A curve is a job on eight hosts: of 0.12 cores, which stand still for most of the time, or, for jobs that hardly
compute, of a device that waits (waiting_jobs.py). For each number of workers the planner forecasts the fastest layout;
measured are a few of the fastest by forecast, one of a kind, and plain data parallelism, all in interleaved rounds,
and the fastest of them counts. Knee and turn of both curves are found by the planner's own function. The same jobs are
measured on two such hosts; from that alone all layouts of four and eight workers are forecast, as if there were no
more than two hosts to measure on, and held against the same measurements.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Sequence
from statistics import mean

from cell_clusters import CLUSTERS, enlarged
from cells import (
    WAITING,
    Cell,
    Pair,
    failures,
    finish,
    head,
    heading,
    measured_pairs,
    ms,
    percent,
    with_measuring,
)
from forecast import percentile

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.scaling import LEAST_SHARE, find_knee
from paceline.records import Layout

JOBS = {
    **dict.fromkeys(("eight-1g", "eight-100m"), ("driving", "image", "text")),
    **dict.fromkeys(("eight-waiting-1g", "eight-waiting-100m"), tuple(WAITING)),
}
"""On each cluster of eight hosts. Light ones: hosts of 0.12 cores are slow."""
SMALL = {
    "eight-1g": "small-1g",
    "eight-100m": "small-100m",
    "eight-waiting-1g": "two-waiting-1g",
    "eight-waiting-100m": "two-waiting-100m",
}
"""Of each cluster of eight hosts, the one of two of them."""
FORECAST_FROM_SMALL = (4, 8)
"""Numbers of workers."""


@dataclasses.dataclass(frozen=True)
class Point:
    """One number of workers."""

    workers: int
    layout: str
    """The fastest by forecast."""
    forecast_s: float
    best: Cell
    """The fastest that was measured."""

    @property
    def measured_s(self) -> float:
        assert self.best.measured_s is not None
        return self.best.measured_s


@dataclasses.dataclass(frozen=True)
class Curve:
    """Predicted and measured, over the same numbers of workers, ascending."""

    pair: Pair
    points: tuple[Point, ...]

    @property
    def workers(self) -> list[int]:
        return [point.workers for point in self.points]

    def speedups(self) -> tuple[list[float], list[float]]:
        """By forecast and by measurement, over the first point."""
        first = self.points[0]
        forecast = [first.workers * first.forecast_s / point.forecast_s for point in self.points]
        return forecast, [first.workers * first.measured_s / point.measured_s for point in self.points]

    def knees(self) -> tuple[int, int]:
        forecast, measured = (find_knee(self.workers, found, LEAST_SHARE) for found in self.speedups())
        return forecast, measured

    def turns(self) -> tuple[int, int]:
        """Numbers of workers with the fastest step."""
        forecast, measured = (
            max(zip(found, (-n for n in self.workers), self.workers, strict=True))[-1]
            for found in self.speedups()
        )
        return forecast, measured

    def apart(self, numbers: tuple[int, int]) -> int:
        """Grid points between two numbers of workers."""
        return abs(self.workers.index(numbers[0]) - self.workers.index(numbers[1]))

    def slower_than_one(self, point: Point) -> str:
        """Whether it was foreseen: `right`, `wrong`, or `within noise`."""
        one = self.points[0]
        noise = math.hypot(point.best.noise, one.best.noise)
        if abs(point.measured_s / one.measured_s - 1) <= noise:
            return "within noise"
        foreseen = point.forecast_s > one.forecast_s
        return "right" if foreseen == (point.measured_s > one.measured_s) else "wrong"


def curve(pair: Pair) -> Curve | None:
    """Of a pair; None where no two numbers of workers were measured."""
    points = []
    for workers, layout, forecast_s in pair.curve:
        mine = [cell for cell in pair.timed if Layout.parse(cell.layout).workers == workers]
        if mine:
            best = min(mine, key=lambda cell: cell.measured_s or math.inf)
            points.append(Point(workers, layout, forecast_s, best))
    return Curve(pair, tuple(points)) if len(points) > 1 else None


def from_small(small: Pair, large: Pair) -> list[Cell]:
    """Cells of the large pair's layouts of 4 and 8 workers, with forecasts made of what two workers measured."""
    if not small.profile:
        return []
    profile, linked = small.known()
    forecaster = Forecaster(profile, enlarged(linked, len(CLUSTERS[large.cluster].hosts)))
    found = []
    for cell in large.timed:
        layout = Layout.parse(cell.layout)
        if layout.workers not in FORECAST_FROM_SMALL:
            continue
        try:
            told = forecaster.forecast(layout)
        except LayoutError:
            # What two workers cannot measure, they cannot forecast; the others' forecast stands in the curve's table.
            continue
        found.append(dataclasses.replace(cell, forecast_s=told.step_s, error_s=told.error_s, was_tried=False))
    return found


def table(pairs: Sequence[Pair], title: str) -> str:
    curves = [found for pair in pairs if pair.cluster in SMALL and (found := curve(pair)) is not None]
    lines = [title, "", *_summary(curves), "", *_transfer(pairs), ""]
    for found in curves:
        lines += [f"**{found.pair.job}**, {CLUSTERS[found.pair.cluster].describe()}", "", *_points(found), ""]
    return "\n".join([*lines, *failures(pairs)]).rstrip() + "\n"


def _summary(curves: Sequence[Curve]) -> list[str]:
    lines = head(
        "job", "cluster", "knee predicted", "measured", "turn predicted", "measured", "within one grid point",
        "slower than one: right", "wrong", "within noise",
    )  # fmt: skip
    for found in curves:
        knees, turns = found.knees(), found.turns()
        said = [found.slower_than_one(point) for point in found.points[1:]]
        near = [found.apart(numbers) <= 1 for numbers in (knees, turns)]
        which = {(True, True): "both", (True, False): "the knee", (False, True): "the turn"}.get(
            tuple(near), "neither"
        )
        counts = [str(said.count(word)) for word in ("right", "wrong", "within noise")]
        numbers = [str(number) for number in (*knees, *turns)]
        lines.append(
            f"| {found.pair.job} | {found.pair.cluster} | {' | '.join([*numbers, which, *counts])} |"
        )
    return lines


def _transfer(pairs: Sequence[Pair]) -> list[str]:
    lines = head("from two workers", "on", "workers", "cells", "mean error", "95th percentile", "mean noise")
    every: list[Cell] = []
    for large in pairs:
        small = next((p for p in pairs if p.job == large.job and p.cluster == SMALL.get(large.cluster)), None)
        if small is None:
            continue
        cells = from_small(small, large)
        every += cells
        for workers in FORECAST_FROM_SMALL:
            mine = [cell for cell in cells if Layout.parse(cell.layout).workers == workers]
            lines += _errors(mine, large.job, large.cluster, str(workers))
    return [*lines, *_errors(every, "all", "", "")]


def _errors(cells: Sequence[Cell], job: str, cluster: str, workers: str) -> list[str]:
    errors = [abs(cell.off) for cell in cells if cell.off is not None]
    if not errors:
        return []
    noise = mean(cell.noise for cell in cells)
    return [
        f"| {job} | {cluster} | {workers} | {len(errors)} | {mean(errors):.1%} | {percentile(errors, 0.95):.1%} "
        f"| {noise:.1%} |"
    ]


def _points(found: Curve) -> list[str]:
    lines = head(
        "workers", "fastest by forecast", "ms", "speed-up", "fastest measured", "ms", "speed-up", "noise",
        "slower than one",
    )  # fmt: skip
    for point, forecast, measured in zip(found.points, *found.speedups(), strict=True):
        said = "" if point is found.points[0] else found.slower_than_one(point)
        lines.append(
            f"| {point.workers} | {point.layout} | {ms(point.forecast_s)} | {forecast:.2f} | {point.best.layout} "
            f"| {ms(point.measured_s)} | {measured:.2f} | {percent(point.best.noise)} | {said} |"
        )
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    with_measuring(parser, SMALL)
    parser.set_defaults(timing=90.0, limit=1200.0)
    options = parser.parse_args()
    large = [(job, box) for box in options.boxes or SMALL for job in options.jobs or JOBS[box]]
    wanted = [pair for job, cluster in large for pair in ((job, SMALL[cluster]), (job, cluster))]
    pairs = measured_pairs(wanted, options)
    finish(table(pairs, heading("knee.py", pairs)), options.out)


if __name__ == "__main__":
    main()
