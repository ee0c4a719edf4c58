"""Where a row of blocks is cut into the stages of a pipeline: by the planner, and by the training."""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterator, Sequence

_SLOWER = 0.05
"""Share by which the slowest stage may be slower than it must be where that sends less. What two measurements of the
same blocks differ by does not move a cut to where much more has to be sent."""
_MUCH_SLOWER = (0.1, 0.2, 0.4, 0.8, 1.6)
"""The same where it is to be seen what sending takes."""
_ROUNDING = 1 + 1e-12


_SAME = 0.15
"""Workers of a pipeline whose speeds differ by less get stages of equal costs: a cut is not moved by noise."""


def uneven(speeds: Sequence[float]) -> tuple[float, ...]:
    """Speeds to cut by; nothing where they hardly differ."""
    if not speeds or max(speeds) < (1 + _SAME) * min(speeds):
        return ()
    return tuple(speeds)


def partition(
    costs: Sequence[float],
    number: int,
    *,
    sends: Sequence[float] = (),
    sizes: Sequence[float] = (),
    largest: float = math.inf,
    speeds: Sequence[float] = (),
) -> list[int]:
    """Where to cut a row into `number` parts, none empty: `number + 1` bounds.

    So that the largest sum of costs, over its part's speed, is smallest; or, of all cuts in which it is hardly larger,
    so that what crosses them is least, and then the largest of these.

    Args:
        sends: of each in the row, what would cross a cut after it; empty: it does not matter.
        sizes: of each in the row; no part has more than `largest`.
        speeds: of who computes each part; empty: all alike.

    Raises:
        ValueError: there is less in the row, or every cut has a larger part.
    """
    row = _Row(costs, speeds or [1.0] * number, sizes, largest)
    return next(_sending_ever_less(row, sends, (_SLOWER,)))


def partitions(
    costs: Sequence[float], number: int, *, sends: Sequence[float] = (), speeds: Sequence[float] = ()
) -> list[list[int]]:
    """Some ways to cut a row: as `partition` does, and others whose largest part is larger, while less crosses them.

    Each sends less than the one before it.
    """
    return list(_sending_ever_less(_Row(costs, speeds or [1.0] * number), sends, (_SLOWER, *_MUCH_SLOWER)))


def _sending_ever_less(row: _Row, sends: Sequence[float], slower: Sequence[float]) -> Iterator[list[int]]:
    """
    Args:
        slower: ascending shares by which the slowest part may be slower than it must be.
    """
    best = _quickest(row)
    least, slowest_s = (len(row.speeds) - 1) * min(sends, default=0.0), row.slowest(best)

    def sending_less(share: float) -> list[int] | None:
        if not sends or _sent(sends, best) <= least:
            return None
        found = _sending_least(row, slowest_s * (1 + share), sends)
        return found if _sent(sends, found) < _sent(sends, best) else None

    best = sending_less(slower[0]) or best
    yield best
    for share in slower[1:]:
        if found := sending_less(share):
            best = found
            yield best


def _quickest(row: _Row) -> list[int]:
    """The cut whose slowest part is fastest."""
    number = len(row.speeds)
    if number > row.length:
        raise ValueError(f"{row.length} costs cannot be cut into {number} parts")
    whole = row.sum(0, row.length)
    high = whole / min(row.speeds)
    best = row.furthest(high)
    if best is None:
        raise ValueError(
            f"of {row.length} sizes cut into {number} parts one is always larger than {row.largest:g}"
        )
    low = max(row.most / max(row.speeds), whole / sum(row.speeds))
    for _ in range(60):
        middle = (low + high) / 2
        found = row.furthest(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
        if high - low <= 1e-9 * high:
            break
    if number > 2 and max(row.speeds) > min(row.speeds):
        # A slow one's part may have to begin earlier than those before it can end.
        best = _sending_least(row, row.slowest(best), [0.0] * row.length)
    return best


def _sent(sends: Sequence[float], bounds: Sequence[int]) -> float:
    return sum(sends[end - 1] for end in bounds[1:-1])


class _Row:
    """A row with the sums of what is in it, the speeds of its parts, and what none of them may exceed but in costs."""

    def __init__(
        self,
        costs: Sequence[float],
        speeds: Sequence[float],
        sizes: Sequence[float] = (),
        largest: float = math.inf,
    ) -> None:
        self.length, self.speeds = len(costs), speeds
        self._costs = [0.0, *itertools.accumulate(costs)]
        self._sizes = [0.0, *itertools.accumulate(sizes)] if sizes and largest < math.inf else []
        self.largest, self.most = largest, max(costs, default=0.0)

    def sum(self, begin: int, end: int) -> float:
        return self._costs[end] - self._costs[begin]

    def cost(self, part: int, begin: int, end: int) -> float:
        """Of a part: its sum over its speed."""
        return self.sum(begin, end) / self.speeds[part]

    def slowest(self, bounds: Sequence[int]) -> float:
        """Of the parts, what the slowest costs."""
        return max(self.cost(part, a, b) for part, (a, b) in enumerate(itertools.pairwise(bounds)))

    def last(self, part: int, begin: int, most: float) -> int:
        """Where a part from `begin` ends at the latest."""
        most *= self.speeds[part]
        end = bisect.bisect_right(self._costs, self._costs[begin] + most * _ROUNDING) - 1
        if self._sizes:
            end = min(
                end, bisect.bisect_right(self._sizes, self._sizes[begin] + self.largest * _ROUNDING) - 1
            )
        return end

    def first(self, part: int, end: int, most: float) -> int:
        """Where a part up to `end` begins at the earliest."""
        most *= self.speeds[part]
        begin = bisect.bisect_left(self._costs, self._costs[end] - most * _ROUNDING)
        if self._sizes:
            begin = max(begin, bisect.bisect_left(self._sizes, self._sizes[end] - self.largest * _ROUNDING))
        return begin

    def furthest(self, most: float) -> list[int] | None:
        """Parts that cost at most `most`, each as long as it may be, so long as enough is left for the others.

        None where there are none; or, of three and more whose speeds differ, none of which each is as long as it may.
        """
        bounds, number = [0], len(self.speeds)
        for part in range(number):
            end = min(self.last(part, bounds[-1], most), self.length - (number - 1 - part))
            if end <= bounds[-1]:
                return None
            bounds.append(end)
        return bounds if bounds[-1] == self.length else None


def _rounded(seconds: float) -> float:
    """What is equal but for rounding is equal."""
    return float(f"{seconds:.9g}")


def _sending_least(row: _Row, most: float, sends: Sequence[float]) -> list[int]:
    """Of all cuts into parts that cost at most `most` the one that sends least, and of these the quickest.

    There has to be one.

    Dynamic programming over where each part may end: not after where the parts so far end at the latest, nor before
    where the parts to come begin at the earliest.
    """
    number = len(row.speeds)
    latest, earliest = [0], [row.length]
    for part in range(number):
        latest.append(min(row.last(part, latest[-1], most), row.length - (number - 1 - part)))
    for part in reversed(range(number)):
        earliest.append(max(part, row.first(part, earliest[-1], most)))
    earliest.reverse()
    # Of each end of the parts so far: what crosses their cuts, the slowest of them, and where the last of them begins.
    known: list[dict[int, tuple[float, float, int]]] = [{0: (0.0, 0.0, 0)}]
    for part in range(1, number + 1):
        before, here = known[-1], {}
        for end in range(max(earliest[part], part), latest[part] + 1):
            sent = sends[end - 1] if part < number else 0.0
            begin = row.first(part - 1, end, most)
            ways = [
                (sent + crossed, max(slowest, _rounded(row.cost(part - 1, begun, end))), begun)
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
