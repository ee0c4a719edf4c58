"""What a display knows about a run while it goes: the latest numbers, the pace and the time left."""

from __future__ import annotations

import collections
from pathlib import Path

from paceline.report import formats
from paceline.report.analysis import Comparison, compare
from paceline.report.kinds import EvaluationEvent, Event, PlanEvent, RunEvent, StepEvent, TrialEvent
from paceline.report.reader import RunLog

_WINDOW = 50
"""The pace is that of the last steps, at most so many."""


class Tracker:
    """Takes events one by one; answers in words."""

    def __init__(self) -> None:
        self.run: RunEvent | None = None
        self.plan: PlanEvent | None = None
        self.step: StepEvent | None = None
        self.evaluation: EvaluationEvent | None = None
        self._trials: list[TrialEvent] = []
        self._recent: collections.deque[StepEvent] = collections.deque(maxlen=_WINDOW)

    def take(self, event: Event) -> None:
        if isinstance(event, RunEvent):
            self.run = event
        elif isinstance(event, TrialEvent):
            self._trials.append(event)
        elif isinstance(event, PlanEvent):
            self.plan = event
        elif isinstance(event, StepEvent):
            self.step = event
            self._recent.append(event)
        elif isinstance(event, EvaluationEvent):
            self.evaluation = event

    @property
    def total_steps(self) -> int | None:
        return self.run.total_steps if self.run else None

    @property
    def share_done(self) -> float | None:
        return self.step.step / self.total_steps if self.step and self.total_steps else None

    def start(self) -> list[str]:
        """The run in a few lines."""
        run = self.run
        if run is None:
            return []
        told = [run.name, f"batch of {formats.plural(run.batch_size, 'sample')}"]
        if run.parameters is not None:
            told.insert(1, formats.plural(run.parameters, "parameter"))
        if run.total_steps is not None:
            epochs = f" ({formats.plural(run.epochs, 'epoch')})" if run.epochs else ""
            told.append(formats.plural(run.total_steps, "step") + epochs)
        told.append(run.precision)
        lines = [" · ".join(filter(None, told))]
        for host in run.cluster.hosts:
            device = host.device_name or host.device
            lines.append(f"{host.name}: {device}, {formats.plural(host.cores, 'core')}")
        return lines

    def trial(self, event: TrialEvent) -> str:
        """One timed layout in a line, with its speed-up where one worker has been timed."""
        if event.error is not None or not event.step_s:
            return f"{event.label}: could not be timed: {event.error or 'no step was timed'}"
        measured = self._comparison().measured[-1]
        told = f"{event.label}: {formats.seconds(measured.step_s.median)} per step"
        if len(event.step_s) > 1:
            told += f" ({formats.seconds(measured.step_s.low)} – {formats.seconds(measured.step_s.high)})"
        told += f", {self.speed(measured.samples_per_s.median)}"
        if measured.speedup and measured.processors > 1:
            told += f", {formats.times(measured.speedup.median)}"
        return told

    def progress(self) -> str:
        """`step 40/812 (5 %)`."""
        if self.step is None:
            return ""
        if not self.total_steps:
            return f"step {formats.count(self.step.step)}"
        share = formats.percent(self.share_done or 0.0)
        return f"step {formats.count(self.step.step)}/{formats.count(self.total_steps)} ({share})"

    def pace(self) -> str:
        """Samples or tokens per second over the last steps."""
        total_s = sum(step.step_s for step in self._recent)
        return self.speed(sum(s.samples for s in self._recent) / total_s) if total_s > 0 else ""

    def speed(self, samples_per_s: float) -> str:
        tokens = self.run.tokens_per_sample if self.run else None
        if tokens:
            return f"{formats.number(samples_per_s * tokens)} tokens/s"
        return f"{formats.number(samples_per_s)} samples/s"

    def shares(self) -> str:
        """Where the time of the last steps went."""
        total_s = sum(step.step_s for step in self._recent)
        if total_s <= 0:
            return ""
        told = []
        for name, field in (
            ("computation", "compute_s"), ("communication", "communication_s"), ("data", "data_s"),
        ):  # fmt: skip
            told.append(f"{name} {formats.percent(sum(getattr(s, field) for s in self._recent) / total_s)}")
        return ", ".join(told)

    def time_left(self) -> str:
        """`1 min 38 s` at the present pace, evaluations not counted; empty where the length is not known."""
        if self.step is None or not self.total_steps or not self._recent:
            return ""
        pace_s = sum(step.step_s for step in self._recent) / len(self._recent)
        return formats.seconds(max(self.total_steps - self.step.step, 0) * pace_s)

    def held_out(self, event: EvaluationEvent) -> str:
        when = (
            f"held out after step {formats.count(event.step)}" if event.step else "held out before training"
        )
        return f"{when}: {formats.metrics(event.metrics)}"

    def _comparison(self) -> Comparison:
        return compare(RunLog(Path(), run=self.run, trials=tuple(self._trials), plan=self.plan))
