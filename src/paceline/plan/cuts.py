"""Where a row of blocks is cut into the stages of a pipeline: by the planner, and by the training."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence

_SLOWER = 0.05
"""Share by which the slowest stage may be slower than it must be where that sends less. What two measurements of the
same blocks differ by does not move a cut to where much more has to be sent."""
_ROUNDING = 1 + 1e-12


def partition(
    costs: Sequence[float],
    number: int,
    *,
    sends: Sequence[float] = (),
    sizes: Sequence[float] = (),
    largest: float = math.inf,
) -> list[int]:
    """Where to cut a row into `number` parts, none empty: `number + 1` bounds.

    So that the largest sum of costs is smallest; or, of all cuts in which it is hardly larger, so that what crosses
    them is least, and then the largest sum.

    Args:
        sends: of each in the row, what would cross a cut after it; empty: it does not matter.
        sizes: of each in the row; no part has more than `largest`.

    Raises:
        ValueError: there is less in the row, or every cut has a larger part.
    """
    if number > len(costs):
        raise ValueError(f"{len(costs)} costs cannot be cut into {number} parts")
    row = _Row(costs, sizes, largest)
    whole = row.cost(0, len(costs))
    best = row.furthest(number, whole)
    if best is None:
        raise ValueError(
            f"of {len(costs)} sizes cut into {number} parts one is always larger than {largest:g}"
        )
    low, high = max(max(costs), whole / number), whole
    for _ in range(60):
        middle = (low + high) / 2
        found = row.furthest(number, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
        if high - low <= 1e-9 * high:
            break
    if not sends or _sent(sends, best) <= (number - 1) * min(sends):
        return best
    slowest = max(row.cost(a, b) for a, b in itertools.pairwise(best))
    found = _sending_least(row, number, slowest * (1 + _SLOWER), sends)
    return found if _sent(sends, found) < _sent(sends, best) else best


def _sent(sends: Sequence[float], bounds: Sequence[int]) -> float:
    return sum(sends[end - 1] for end in bounds[1:-1])


class _Row:
    """A row with the sums of what is in it, and what no part may exceed but in costs."""

    def __init__(
        self, costs: Sequence[float], sizes: Sequence[float] = (), largest: float = math.inf
    ) -> None:
        self.length = len(costs)
        self._costs = [0.0, *itertools.accumulate(costs)]
        self._sizes = [0.0, *itertools.accumulate(sizes)] if sizes and largest < math.inf else []
        self._largest = largest

    def cost(self, begin: int, end: int) -> float:
        return self._costs[end] - self._costs[begin]

    def _last(self, begin: int, most: float) -> int:
        """Where a part from `begin` ends at the latest."""
        end = bisect.bisect_right(self._costs, self._costs[begin] + most * _ROUNDING) - 1
        if self._sizes:
            end = min(
                end, bisect.bisect_right(self._sizes, self._sizes[begin] + self._largest * _ROUNDING) - 1
            )
        return end

    def first(self, end: int, most: float) -> int:
        """Where a part up to `end` begins at the earliest."""
        begin = bisect.bisect_left(self._costs, self._costs[end] - most * _ROUNDING)
        if self._sizes:
            begin = max(begin, bisect.bisect_left(self._sizes, self._sizes[end] - self._largest * _ROUNDING))
        return begin

    def furthest(self, number: int, most: float) -> list[int] | None:
        """Parts of at most `most`, each as long as it may be, so long as enough is left for the others."""
        bounds = [0]
        for left in range(number - 1, -1, -1):
            end = min(self._last(bounds[-1], most), self.length - left)
            if end <= bounds[-1]:
                return None
            bounds.append(end)
        return bounds if bounds[-1] == self.length else None


def _rounded(seconds: float) -> float:
    """What is equal but for rounding is equal."""
    return float(f"{seconds:.9g}")


def _sending_least(row: _Row, number: int, most: float, sends: Sequence[float]) -> list[int]:
    """Of all cuts into parts of at most `most` the one that sends least, and of these the quickest.

    Dynamic programming over where each part may end: not after where the parts so far end at the latest, nor before
    where the parts to come begin at the earliest.
    """
    latest = row.furthest(number, most)
    assert latest is not None
    earliest = [row.length]
    for left in range(number - 1, -1, -1):
        earliest.append(max(left, row.first(earliest[-1], most)))
    earliest.reverse()
    # Of each end of the parts so far: what crosses their cuts, the slowest of them, and where the last of them begins.
    known: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for part in range(1, number + 1):
        before, here = known[-1], {}
        for end in range(max(earliest[part], part), latest[part] + 1):
            sent = sends[end - 1] if part < number else 0.0
            begin = row.first(end, most)
            ways = [
                (sent + crossed, max(slowest, _rounded(row.cost(begun, end))), begun)
                for begun, (crossed, slowest, _) in before.items()
                if begin <= begun < end
            ]
            if ways:
                here[end] = min(ways)
        known.append(here)
    bounds = [row.length]
    for part in range(number, 0, -1):
        bounds.append(known[part][bounds[-1]][2])
    return bounds[::-1]
