"""The training loop of `paceline train`: steps, evaluations, events, the end."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch

from paceline.events import EventWriter
from paceline.train.noise import StepNoise
from paceline.train.replica import StepResult
from paceline.train.session import Session
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
    sums_s: dict[str, float] = dataclasses.field(default_factory=lambda: dict.fromkeys(_SUMS, 0.0))
    step_s: list[float] = dataclasses.field(default_factory=list)

    @property
    def median_step_s(self) -> float | None:
        return median(self.step_s) if self.step_s else None


class TrainingLoop:
    """Trains a session to its length or target. Every worker runs it; only rank 0 has a `writer`."""

    def __init__(
        self,
        session: Session,
        length: Length,
        target: Target | None,
        writer: EventWriter | None,
        watch: Watch | None = None,
    ) -> None:
        self._session, self._length, self._target, self._writer = session, length, target, writer
        self._watch = watch
        self._outcome = Outcome()
        self._first_metrics: dict[str, float] | None = None
        self._evaluated_at = -1

    def run(self) -> Outcome:
        """Train; returns when the length or the target is reached, or a stop was requested."""
        outcome, every = self._outcome, self._session.job.evaluate_every_steps
        if self._target is not None:
            self._evaluate()
        for batch in self._session.batches(self._length.epochs, self._length.steps):
            result = self._session.step(batch)
            self._record(result, batch.epoch)
            if result.stop:
                outcome.status = "interrupted"
                return outcome
            if every is not None and outcome.steps % every == 0:
                self._evaluate()
                if self._target_reached():
                    outcome.status = "target reached"
                    return outcome
        if self._evaluated_at != outcome.steps:
            self._evaluate()
            if self._target_reached():
                outcome.status = "target reached"
        return outcome

    def _record(self, result: StepResult, epoch: int) -> None:
        outcome = self._outcome
        outcome.steps += 1
        outcome.samples += result.samples
        outcome.train_s += result.step_s
        outcome.step_s.append(result.step_s)
        for name in _SUMS:
            outcome.sums_s[name] += getattr(result, name)
        if self._writer is not None:
            self._writer.write(
                "step",
                step=outcome.steps,
                epoch=epoch,
                loss=result.loss,
                lr=result.lr,
                grad_norm=result.grad_norm,
                samples=result.samples,
                step_s=round(result.step_s, 7),
                **{name: round(getattr(result, name), 7) for name in _SUMS},
                elapsed_s=round(outcome.train_s, 6),
            )
            told = "" if self._watch is None else self._watch.on_step(result)
            if told:
                self._writer.write("message", level="warning", text=told)
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

    def _evaluate(self) -> None:
        begin_s = time.perf_counter()
        metrics, samples = self._session.evaluate_counted()
        evaluation_s = time.perf_counter() - begin_s
        outcome = self._outcome
        outcome.metrics = metrics
        outcome.evaluation_s += evaluation_s
        self._first_metrics = self._first_metrics or metrics
        self._evaluated_at = outcome.steps
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
        if self._target is None or self._first_metrics is None:
            return False
        name = self._target.metric
        return self._target.reached(self._first_metrics[name], self._outcome.metrics[name])


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
    if not session.layout.splits_model:
        return save_weights(session.model, directory) if session.group.rank == 0 else None
    described = session.describe_state()
    tensors = ((name, tensor) for name, tensor in session.whole_state() if name in described)
    if session.group.rank == 0:
        return save_tensors(tensors, described, directory)
    for _ in tensors:
        pass
    return None
