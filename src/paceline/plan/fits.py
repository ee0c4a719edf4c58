"""Latency and bandwidth of a collective, fitted to what was measured: a straight line for each range of sizes.

An exchange goes other ways for small and for large messages (at once or in pieces, from the cache or from memory), so
one line seldom fits all. The ranges are found by dynamic programming over where they may end; as many are taken as the
Bayesian information criterion (Schwarz 1978) is least for, with relative errors, of which 3 % are taken to be noise.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from pydantic import Field

from paceline.records import Record

_MOST_PIECES = 3
_FEWEST_POINTS = 3
"""In a piece: a line through two is no fit."""
_NOISE = 0.03
_FLAT = 1e-3
"""Share of the latency below which what the bytes take is none."""

Points = Sequence[tuple[float, float]]
"""Bytes and seconds, bytes ascending."""


class Piece(Record):
    """`latency_s + bytes / bytes_per_s`, for a range of sizes."""

    least_bytes: float = Field(ge=0)
    most_bytes: float = Field(ge=0)
    """The smallest and the largest size that was measured in it."""
    latency_s: float = Field(ge=0)
    bytes_per_s: float | None = Field(default=None, gt=0)
    """None: the time does not grow with the size."""

    def seconds(self, num_bytes: float) -> float:
        return self.latency_s + (num_bytes / self.bytes_per_s if self.bytes_per_s else 0.0)


class Fit(Record):
    """All of what was measured, piece by piece."""

    pieces: tuple[Piece, ...] = Field(min_length=1)
    """By size, ascending."""
    error: float = Field(ge=0)
    """Mean relative distance of what was measured from its line."""

    def seconds(self, num_bytes: float) -> float:
        """Of a size; what is between two pieces belongs to the larger one."""
        last = self.pieces[-1]
        return next((p for p in self.pieces if num_bytes <= p.most_bytes), last).seconds(num_bytes)


def fit(points: Points) -> Fit:
    """The lines that fit best, in the sense of least squares of relative errors, neither part of a line negative.

    Args:
        points: at least one; no time is 0.
    """
    number = len(points)
    best: list[tuple[float, list[int]]] = []
    for pieces in range(1, _MOST_PIECES + 1):
        found = _divided(points, pieces)
        if found is not None:
            squares, bounds = found
            criterion = number * math.log(squares / number + _NOISE**2) + 3 * pieces * math.log(number)
            best.append((criterion, bounds))
    bounds = min(best)[1]
    lines = tuple(_line(points[begin:end]) for begin, end in itertools.pairwise(bounds))
    errors = [
        abs(piece.seconds(size) / seconds - 1)
        for piece, (begin, end) in zip(lines, itertools.pairwise(bounds), strict=True)
        for size, seconds in points[begin:end]
    ]
    return Fit(pieces=lines, error=sum(errors) / number)


def _divided(points: Points, pieces: int) -> tuple[float, list[int]] | None:
    """The least squares with so many pieces, and where these begin and end; None where there are too few points."""
    number = len(points)
    if pieces > 1 and number < pieces * _FEWEST_POINTS:
        return None
    starts = [0.0 if at == 0 else math.inf for at in range(number + 1)]
    reached: list[tuple[float, list[int]]] = [(squares, [0]) for squares in starts]
    fewest = min(_FEWEST_POINTS, number)
    for _ in range(pieces):
        reached = [
            min(
                (
                    (reached[begin][0] + _squares(points[begin:end]), [*reached[begin][1], end])
                    for begin in range(end - fewest + 1)
                    if reached[begin][0] < math.inf
                ),
                default=(math.inf, []),
            )
            for end in range(number + 1)
        ]
    return reached[number]


def _squares(points: Points) -> float:
    line = _line(points)
    return sum((line.seconds(size) / seconds - 1) ** 2 for size, seconds in points)


def _line(points: Points) -> Piece:
    """Through points weighted by 1/seconds²."""
    weights = [1 / seconds**2 for _, seconds in points]
    total = sum(weights)
    mean_bytes = sum(w * x for w, (x, _) in zip(weights, points, strict=True)) / total
    mean_s = sum(w * y for w, (_, y) in zip(weights, points, strict=True)) / total
    spread = sum(w * (x - mean_bytes) ** 2 for w, (x, _) in zip(weights, points, strict=True))
    together = sum(w * (x - mean_bytes) * (y - mean_s) for w, (x, y) in zip(weights, points, strict=True))
    slope = max(0.0, together / spread) if spread > 0 else 0.0
    latency_s = mean_s - slope * mean_bytes
    if latency_s < 0:
        latency_s = 0.0
        slope = sum(w * x * y for w, (x, y) in zip(weights, points, strict=True)) / sum(
            w * x * x for w, (x, _) in zip(weights, points, strict=True)
        )
    is_flat = slope * points[-1][0] < _FLAT * latency_s
    return Piece(
        least_bytes=points[0][0],
        most_bytes=points[-1][0],
        latency_s=latency_s,
        bytes_per_s=None if is_flat else 1 / slope,
    )
