"""What something costs against its size: measured points, and straight lines between them."""

from __future__ import annotations

import bisect
import itertools
from typing import Self

from pydantic import model_validator

from paceline.records import Record


class Curve(Record):
    """Seconds (or bytes) against a size, never falling, piecewise linear through the points.

    Below the smallest size the line through the first two points goes on, but never below what is proportional to the
    size: what is smaller is not cheaper by the piece. Above the largest the line through the last two goes on. One
    point alone is proportional to the size.
    """

    points: tuple[tuple[float, float], ...]
    """`(size, cost)`, sizes ascending, costs not falling."""

    @model_validator(mode="after")
    def _is_a_curve(self) -> Self:
        sizes = [size for size, _ in self.points]
        costs = [cost for _, cost in self.points]
        if not self.points:
            raise ValueError("a curve needs a point")
        if sizes[0] < 0 or any(a >= b for a, b in itertools.pairwise(sizes)):
            raise ValueError(f"sizes are not ascending: {sizes}")
        if costs[0] < 0 or any(a > b for a, b in itertools.pairwise(costs)):
            raise ValueError(f"costs fall: {costs}")
        return self

    @classmethod
    def of(cls, measured: dict[float, float]) -> Self:
        """Through measured points. A larger size that took less is noise: the two are averaged."""
        groups: list[list[tuple[float, float]]] = []
        for point in sorted(measured.items()):
            groups.append([point])
            while len(groups) > 1 and _mean(groups[-2]) > _mean(groups[-1]):
                last = groups.pop()
                groups[-1] += last
        return cls(points=tuple((size, _mean(group)) for group in groups for size, _ in group))

    @classmethod
    def line(cls, fixed: float, per_unit: float) -> Self:
        """`fixed + per_unit · size`."""
        return cls(points=((0.0, fixed), (1.0, fixed + per_unit)))

    def __call__(self, size: float) -> float:
        """The cost of a size of at least 0."""
        points = self.points
        if len(points) == 1:
            (only, cost) = points[0]
            return cost * size / only if only else cost
        at = bisect.bisect_left(points, (size,))
        at = min(max(at, 1), len(points) - 1)
        (x0, y0), (x1, y1) = points[at - 1], points[at]
        on_line = y0 + (y1 - y0) * (size - x0) / (x1 - x0)
        return max(on_line, y0 * size / x0) if size < x0 else on_line

    def scaled(self, factor: float) -> Curve:
        """The same at `factor` times the cost."""
        return Curve(points=tuple((size, cost * factor) for size, cost in self.points))

    def at_least(self, cost: float) -> Curve:
        """The same, but nowhere below `cost`, a number of at least 0."""
        points = [*self.points]
        if len(points) == 1:
            only, value = points[0]
            points = [(0.0, 0.0), (only, value)] if only else [(0.0, value), (1.0, value)]
        (x0, y0), (x1, y1) = points[:2]
        if x0 > 0:
            points.insert(0, (0.0, max(0.0, y0 - (y1 - y0) / (x1 - x0) * x0)))
        (x0, y0), (x1, y1) = points[-2:]
        if y1 > y0:
            # Its last line comes out of what it must not be below, if not before then after its last point.
            slope = (y1 - y0) / (x1 - x0)
            far = 2 * max(x1, x1 + (cost - y1) / slope)
            points.append((far, y1 + slope * (far - x1)))
        found = {points[0][0]: max(cost, points[0][1])}
        for (x0, y0), (x1, y1) in itertools.pairwise(points):
            if y0 < cost < y1:
                found[x0 + (x1 - x0) * (cost - y0) / (y1 - y0)] = cost
            found[x1] = max(cost, y1)
        return Curve(points=tuple(found.items()))


def _mean(points: list[tuple[float, float]]) -> float:
    return sum(cost for _, cost in points) / len(points)
