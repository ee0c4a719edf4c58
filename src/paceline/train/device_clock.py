"""What the device has done by when, and how long the parts of a step take."""

from __future__ import annotations

import dataclasses
import time

import torch

Mark = float | torch.cuda.Event
"""A moment in a device's work; on a CPU as the caller's clock tells it."""


def done_s(device: torch.device) -> float:
    """The time, when the device has done all that it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class DeviceClock:
    """Tells moments of a device's work apart without waiting for any.

    A GPU is told what to do long before it does it: the caller's clock says when it was told.
    """

    def __init__(self, device: torch.device) -> None:
        self.is_callers = device.type != "cuda"

    def mark(self) -> Mark:
        """When all that was asked for until now is done."""
        if self.is_callers:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    @staticmethod
    def seconds(first: Mark, then: Mark) -> float:
        """Between two; waits until a GPU has come to the second."""
        if isinstance(first, float) or isinstance(then, float):
            assert isinstance(first, float)
            assert isinstance(then, float)
            return then - first
        then.synchronize()
        return float(first.elapsed_time(then)) / 1e3


@dataclasses.dataclass(frozen=True)
class StepTimes:
    """Seconds of a step's parts."""

    step_s: float
    compute_s: float
    communication_s: float
    optimizer_s: float


class StepClock:
    """Takes the times of one step after the other.

    On a GPU computation is what lies between its beginning and the end of its backward pass, sums of gradients that are
    under way beside it included; and the update is that of the step before, as this one has not come to pass when its
    times are told.
    """

    def __init__(self, device: torch.device) -> None:
        self._clock = DeviceClock(device)
        self._begin_s = self._waited_s = self._hidden_s = 0.0
        self._marks: list[Mark] = []
        self._update: tuple[Mark, Mark] | None = None

    def begin(self, waited_s: float) -> None:
        """
        Args:
            waited_s: what this worker has waited for others until now.
        """
        self._begin_s, self._waited_s = time.perf_counter(), waited_s
        self._marks = [self._clock.mark()]

    def end_backward(self, waited_s: float) -> None:
        self._marks.append(self._clock.mark())
        self._hidden_s = waited_s - self._waited_s

    def end_reduction(self) -> None:
        """The gradients are those of all, and this worker has waited for them."""
        self._marks.append(self._clock.mark())

    def end(self) -> StepTimes:
        """The update is on its way, or done."""
        step_s = time.perf_counter() - self._begin_s
        begin, backward_end, reduced = self._marks
        end, seconds = self._clock.mark(), self._clock.seconds
        compute_s, communication_s = seconds(begin, backward_end), seconds(backward_end, reduced)
        if self._clock.is_callers:
            compute_s, communication_s = compute_s - self._hidden_s, communication_s + self._hidden_s
            return StepTimes(step_s, compute_s, communication_s, seconds(reduced, end))
        optimizer_s = seconds(*self._update) if self._update is not None else 0.0
        self._update = reduced, end
        return StepTimes(step_s, compute_s, communication_s, optimizer_s)
