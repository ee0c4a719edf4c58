"""How good a ranking of layouts is: Kendall's tau, and what a choice loses against the best."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence

from cells import Cell, Pair


def kendall_tau(
    forecast: Sequence[float], measured: Sequence[float], noise: Sequence[float] | None = None
) -> float:
    """Kendall's tau-b (Kendall 1945): pairs in the same order less those in the other, over the mean without ties.

    Args:
        noise: relative, of each measurement; pairs whose measurements differ by no more than theirs together are left
            out.

    Returns:
        -1 to 1; NaN where there is no pair to compare.
    """
    score, forecast_differs, measured_differs = 0, 0, 0
    for a, b in itertools.combinations(range(len(measured)), 2):
        if noise is not None and not differ(measured[a], measured[b], noise[a], noise[b]):
            continue
        one, other = _sign(forecast[a] - forecast[b]), _sign(measured[a] - measured[b])
        score += one * other
        forecast_differs += one != 0
        measured_differs += other != 0
    if not (forecast_differs and measured_differs):
        return math.nan
    return score / math.sqrt(forecast_differs * measured_differs)


def differ(one_s: float, other_s: float, one_noise: float, other_noise: float) -> bool:
    """By more than the noise of both, which is independent."""
    return abs(one_s / other_s - 1) > math.hypot(one_noise, other_noise)


def _sign(number: float) -> int:
    return (number > 0) - (number < 0)


@dataclasses.dataclass(frozen=True)
class Ranking:
    """How a pair's forecasts rank its layouts, and what each choice loses."""

    pair: Pair
    taken: Cell
    """What the planner takes."""
    best: Cell
    """The fastest that was measured, with a forecast or not; of those that were timed once more, if any were."""
    tau: float
    tau_beyond_noise: float
    rules: dict[str, Cell]
    """What rules of thumb take, as far as it could be measured."""

    @property
    def regret(self) -> float:
        return self.regret_of(self.taken)

    def regret_of(self, cell: Cell) -> float:
        """Time lost against the best, relative."""
        one, best = self._alike(cell, self.best)
        return _seconds(one) / _seconds(best) - 1

    @property
    def best_rule(self) -> str:
        """The rule of thumb that does best; empty where none could be measured."""
        return min(self.rules, key=lambda rule: self.regret_of(self.rules[rule]), default="")

    @property
    def is_worse_than_a_rule(self) -> bool:
        """By more than the noise of both."""
        if not self.best_rule:
            return False
        mine, rule = self._alike(self.taken, self.rules[self.best_rule])
        slower = _seconds(mine) > _seconds(rule)
        return slower and differ(_seconds(mine), _seconds(rule), mine.noise, rule.noise)

    def _alike(self, *cells: Cell) -> list[Cell]:
        """Cells of these layouts that were timed in turns: once more where all of them were."""
        found = self.pair.timed_again
        if not all(cell.layout in found for cell in cells):
            found = {cell.layout: cell for cell in self.pair.timed}
        return [found[cell.layout] for cell in cells]


def ranking(pair: Pair) -> Ranking | None:
    """Of a pair; None where what the planner takes was not measured."""
    taken = pair.cell(pair.choice)
    if taken is None:
        return None
    ranked = [cell for cell in pair.timed if cell.forecast_s is not None]
    forecast = [cell.forecast_s or 0.0 for cell in ranked]
    measured = [_seconds(cell) for cell in ranked]
    found = {rule: pair.cell(layout) for rule, layout in pair.rules.items()}
    again = pair.timed_again
    return Ranking(
        pair=pair,
        taken=again.get(taken.layout, taken),
        best=min(list(again.values()) or pair.timed, key=_seconds),
        tau=kendall_tau(forecast, measured),
        tau_beyond_noise=kendall_tau(forecast, measured, [cell.noise for cell in ranked]),
        rules={rule: cell for rule, cell in found.items() if cell is not None},
    )


def _seconds(cell: Cell) -> float:
    assert cell.measured_s is not None
    return cell.measured_s
