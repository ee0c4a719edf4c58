"""The training loop of `paceline train`: steps, evaluations, events, the end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from paceline.events import EventWriter
from paceline.train.allocator import give_back_freed_memory
from paceline.train.noise import StepNoise
from paceline.train.session import Session
from paceline.train.step import StepResult
from paceline.train.target import Length, Target
from paceline.train.watch import Watch
from paceline.train.weights import load_weights, save_tensors, save_weights

_SUMS = ("compute_s", "communication_s", "data_s", "optimizer_s")


@dataclasses.dataclass
class Outcome:
    """How the training went, as every worker knows it."""

    status: str = "finished"
    steps: int = 0
    samples: int = 0
    train_s: float = 0.0
    evaluation_s: float = 0.0
    metrics: dict[str, float] = dataclasses.field(default_factory=dict)
    first_metrics: dict[str, float] | None = None
    evaluated_at: int = -1
    """The step of the last evaluation."""
    epochs: int = 0
    """Passes over the data until now, and ..."""
    batches: int = 0
    """... batches of the next one that were taken."""


@dataclasses.dataclass
class Tally:
    """What this worker did in the present layout."""

    steps: int = 0
    train_s: float = 0.0
    sums_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    step_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_step_s(self) -> float | None:
        return median(self.step_s) if self.step_s else None


class TrainingLoop:
    """Trains a session to its length or target. Every worker runs it; only rank 0 has a `writer`.

    Where the layout may change it has a session for each layout, one after the other, and none while the layout leaves
    this worker out.
    """

    def __init__(
        self,
        session: Session | None,
        length: Length,
        target: Target | None,
        writer: EventWriter | None,
        watch: Watch | None = None,
        *,
        may_change: bool = False,
    ) -> None:
        """
        Args:
            may_change: `run` returns when the watch finds that the layout should be reconsidered.
        """
        self.session, self.length = session, length
        self.watch = watch or Watch(None, 0.0)
        self.outcome, self.tally = Outcome(), Tally()
        self._target, self._writer, self._may_change = target, writer, may_change
        self._stop_requested = False

    def run(self) -> bool:
        """Train; whether the training has ended: its length or its target is reached, or a stop was requested.

        If it has not, the layout is to be reconsidered: then on all workers, after the same step. `run` goes on.
        """
        session, outcome = self.session, self.outcome
        assert session is not None
        every = session.job.evaluate_every_steps
        if self._target is not None and outcome.evaluated_at < 0:
            self._evaluate(session)
        steps = None if self.length.steps is None else self.length.steps - outcome.steps
        for batch in session.batches(self.length.epochs, steps, (outcome.epochs, outcome.batches)):
            result = session.step(batch)
            outcome.epochs, outcome.batches = batch.epoch, batch.index + 1
            self._record(session, result)
            if result.stop:
                outcome.status = "interrupted"
                return True
            if every is not None and outcome.steps % every == 0:
                self._evaluate(session)
                if self._target_reached():
                    outcome.status = "target reached"
                    return True
            if result.change and outcome.steps != self.length.steps:
                return False
        if outcome.evaluated_at != outcome.steps:
            self._evaluate(session)
            if self._target_reached():
                outcome.status = "target reached"
        return True

    def change(self, session: Session | None) -> None:
        """Go on with another session; None: this worker has nothing to do any more, or not yet."""
        self.session, self.tally = session, Tally()
        if session is not None and self._stop_requested:
            session.request_stop()

    def request_stop(self) -> None:
        """As `Session.request_stop`, of the present session or the next."""
        self._stop_requested = True
        if self.session is not None:
            self.session.request_stop()

    def _record(self, session: Session, result: StepResult) -> None:
        outcome, tally = self.outcome, self.tally
        outcome.steps += 1
        outcome.samples += result.samples
        outcome.train_s += result.step_s
        tally.steps += 1
        tally.train_s += result.step_s
        tally.step_s.append(result.step_s)
        for name in _SUMS:
            tally.sums_s[name] += getattr(result, name)
        if self._writer is not None:
            self._writer.write(
                "step",
                step=outcome.steps,
                epoch=outcome.epochs,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                samples=result.samples,
                step_s=round(result.step_s, 7),
                **{name: round(getattr(result, name), 7) for name in _SUMS},
                elapsed_s=round(outcome.train_s, 6),
            )
            if told := self.watch.on_step(result):
                self._writer.write("message", level="warning", text=told)
            if self._may_change and self.watch.is_due:
                session.request_change()
            if result.noise is not None:
                self._record_noise(result.noise)

    def _record_noise(self, noise: StepNoise) -> None:
        assert self._writer is not None
        scale = noise.scale
        self._writer.write(
            "noise",
            **noise.measured.to_json(),
            noise_scale=scale.samples,
            low=scale.low,
            high=scale.high,
            measurements=scale.measurements,
            every=noise.every,
            cost_s=round(noise.cost_s, 7),
        )

    def _evaluate(self, session: Session) -> None:
        begin_s = time.perf_counter()
        metrics, samples = session.evaluate_counted()
        evaluation_s = time.perf_counter() - begin_s
        outcome = self.outcome
        outcome.metrics = metrics
        outcome.evaluation_s += evaluation_s
        outcome.first_metrics = outcome.first_metrics or metrics
        outcome.evaluated_at = outcome.steps
        if self._writer is not None:
            self._writer.write(
                "evaluation",
                step=outcome.steps,
                elapsed_s=round(outcome.train_s, 6),
                evaluation_s=round(evaluation_s, 6),
                samples=samples,
                metrics=metrics,
            )

    def _target_reached(self) -> bool:
        outcome = self.outcome
        if self._target is None or outcome.first_metrics is None:
            return False
        name = self._target.metric
        return self._target.reached(outcome.first_metrics[name], outcome.metrics[name])


def showcase(session: Session, writer: EventWriter | None, directory: Path) -> dict[str, float]:
    """Run the job's showcase on the trained model; its numbers, and its texts in the events.

    Where the layout splits the model, it is built once more and reads the weights that were saved in `directory`.
    """
    function = session.job.showcase
    if function is None:
        return {}
    model = session.model
    if session.layout.splits_model:
        model = load_weights(session.job.model(), directory)
    model.eval()
    with torch.no_grad():
        shown: dict[str, Any] = dict(function(model))
    texts = {name: value for name, value in shown.items() if isinstance(value, str)}
    numbers = {name: float(value) for name, value in shown.items() if not isinstance(value, str)}
    if writer is not None:
        writer.write("showcase", texts=texts, numbers=numbers)
    return numbers


def save(session: Session, directory: Path) -> str | None:
    """Write the trained weights into the run's directory; the file's name, on rank 0. All workers call it."""
    give_back_freed_memory()
    if not session.layout.splits_model:
        return save_weights(session.model, directory) if session.group.rank == 0 else None
    described = session.describe_state()
    tensors = ((name, tensor) for name, tensor in session.whole_state() if name in described)
    if session.group.rank == 0:
        return save_tensors(tensors, described, directory)
    for _ in tensors:
        pass
    return None
