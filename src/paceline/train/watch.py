"""Holding a run to its forecast: saying so when steps take longer than was foreseen, and where."""

from __future__ import annotations

import collections
from statistics import median

from paceline.train.step import StepResult

_WINDOW = 20
"""Steps whose median is compared, one window after the other."""
_LEAST_ERROR = 0.15
"""Nothing is said of less: a busy machine's steps vary by as much."""
_PARTS = {
    "compute_s": "computation",
    "communication_s": "communication, waiting included,",
    "optimizer_s": "the optimizer",
    "data_s": "reading the data",
}
_CAUSES = {
    "compute_s": "other programs may have taken the cores, or the processor slowed down",
    "communication_s": "a link may have got slower, or another worker",
    "optimizer_s": "memory may be short, or its bandwidth taken by other programs",
    "data_s": "the data may come from a slower place, or other programs may have taken the cores",
}


class Watch:
    """Compares a run's steps with what was expected of them.

    A parting is told once when two windows of steps in a row are off by more than the error, and again only after steps
    have come back to what was expected.
    """

    def __init__(
        self,
        expected_s: float | None,
        error_s: float,
        *,
        trial_s: float | None = None,
        rest_steps: int = 0,
        rest_s: float = 0.0,
    ) -> None:
        """
        Args:
            expected_s: seconds of a step by forecast; None: nothing was forecast, and nothing is told.
            error_s: by how much the forecast may err.
            trial_s: what a step took when the layout was timed: what lies between that and the forecast is expected.
            rest_steps, rest_s: before so many steps, and so many seconds of steps, `is_due` is never true.
        """
        self._rest_steps, self._rest_s = rest_steps, rest_s
        self.step_s: float | None = None
        """Of the last window, the median."""
        self._expected_s = expected_s
        self._error_s = max(error_s, (expected_s or 0.0) * _LEAST_ERROR)
        self._bounds_s = [bound for bound in (expected_s, trial_s) if bound is not None]
        self._window: list[StepResult] = []
        self._usual: dict[str, float] | None = None
        """Of the first window that was as expected: what a step's parts took."""
        self._off = collections.deque((False, False), maxlen=2)
        self._told = False

    @property
    def expected_s(self) -> float | None:
        return self._expected_s

    @property
    def is_due(self) -> bool:
        """Whether the layout should be reconsidered: steps take more or less than expected, and the rest is over."""
        return all(self._off) and not self._window and self._rest_steps <= 0 and self._rest_s <= 0

    def on_step(self, result: StepResult) -> str:
        """Take a step; a sentence where the run has parted from its forecast, or has come back to it; else empty."""
        self._rest_steps -= 1
        self._rest_s -= result.step_s
        if self._expected_s is None:
            return ""
        self._window.append(result)
        if len(self._window) < _WINDOW:
            return ""
        window, self._window = self._window, []
        self.step_s = step_s = median(r.step_s for r in window)
        parts = {name: median(getattr(r, name) for r in window) for name in _PARTS}
        nearest_s = min(max(step_s, min(self._bounds_s)), max(self._bounds_s))
        is_off = abs(step_s - nearest_s) > self._error_s
        self._off.append(is_off)
        if not is_off and self._usual is None:
            self._usual = parts
        if all(self._off) and not self._told:
            self._told = True
            return self._parted(step_s, parts)
        if not any(self._off) and self._told:
            self._told = False
            return f"Steps take {step_s * 1e3:.3g} ms again, as was forecast."
        return ""

    def _parted(self, step_s: float, parts: dict[str, float]) -> str:
        assert self._expected_s is not None
        ratio = step_s / self._expected_s
        told = (
            f"Steps take {step_s * 1e3:.3g} ms, {ratio:.2f} times the forecast of {self._expected_s * 1e3:.3g} ± "
            f"{self._error_s * 1e3:.2g} ms"
        )
        if ratio < 1 or self._usual is None:
            return f"{told}."
        more = {name: parts[name] - self._usual[name] for name in _PARTS}
        name = max(more, key=lambda n: more[n])
        longer = f"{_PARTS[name]} takes {more[name] * 1e3:.3g} ms more than in the run's first steps"
        return f"{told}: {longer}; {_CAUSES[name]}."
