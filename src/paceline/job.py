"""`Job`: what to train. Ordinary PyTorch callables, and nothing about how it is split.

PyTorch is not imported here: a job is described before anything heavy is loaded.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from paceline.errors import JobError

__all__ = ["Job"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
    """One training job.

    Attributes:
        model: `() -> nn.Module`. Called once per worker under a fixed seed; never modified by name.
        data: `(split) -> Dataset` for the splits `"train"` and `"test"`; map-style or iterable.
        loss: `(outputs, batch) -> mean loss over the batch's samples`, a scalar tensor; or
            `-> (sum, weight)`, two scalar tensors, where samples weigh differently (padding
            tokens, class weights): the global loss is then `Σ sum / Σ weight`.
        optimizer: `(params) -> torch.optim.Optimizer`; `params` are the model's parameters that
            require a gradient, in the order of `model.parameters()`.
        batch_size: samples in one global batch: one step, whatever the layout.
        name: what the run is called; the job file's stem by default.
        inputs: `(batch) -> what the model is called with`: a tuple becomes positional arguments,
            a dict keyword arguments, anything else the only argument. By default: the first
            element of a tuple or list batch; the entries of a dict batch that `model.forward`
            names; a tensor batch itself.
        collate: `(list of samples) -> batch`; PyTorch's `default_collate` by default.
        metrics: name -> `(outputs, batch) -> mean` or `-> (sum, weight)`, computed on the test split;
            `loss` is always among the results.
        finish: name -> `(float) -> float`, applied to a metric after averaging (`math.sqrt`, say).
        schedule: `(optimizer, total_steps) -> torch.optim.lr_scheduler.LRScheduler`, stepped once a
            step.
        clip_norm: the largest global norm of the gradient; None leaves it as it is.
        epochs, steps: how long to train if the command line does not say; `steps` wins.
        evaluate_every_steps: how often to evaluate on the test split; None: only at the end.
        evaluation_batch_size: samples per global batch in evaluation; `batch_size` by default. It is cut as
            a batch of the training: into micro-batches and shares of workers.
        loader_workers: processes of PyTorch's DataLoader that read samples for each worker; 0: the
            worker reads them itself. A sample's random draws from torch's generator depend on
            (seed, epoch, sample), whoever reads it.
        tokens_per_sample: where set, throughput is also given in tokens per second.
        showcase: `(model) -> {name: number or text}`, run on one worker after training with the
            whole model in evaluation mode; numbers join the final metrics, text is shown in the report.
    """

    model: Callable[[], Any]
    data: Callable[[str], Any]
    loss: Callable[[Any, Any], Any]
    optimizer: Callable[[Iterable[Any]], Any]
    batch_size: int
    name: str | None = None
    inputs: Callable[[Any], Any] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    metrics: Mapping[str, Callable[[Any, Any], Any]] = dataclasses.field(default_factory=dict)
    finish: Mapping[str, Callable[[float], float]] = dataclasses.field(default_factory=dict)
    schedule: Callable[[Any, int], Any] | None = None
    clip_norm: float | None = None
    epochs: int | None = None
    steps: int | None = None
    evaluate_every_steps: int | None = None
    evaluation_batch_size: int | None = None
    loader_workers: int = 0
    tokens_per_sample: int | None = None
    showcase: Callable[[Any], Mapping[str, float | str]] | None = None

    def __post_init__(self) -> None:
        for field in ("model", "data", "loss", "optimizer"):
            _require_callable(field, getattr(self, field), optional=False)
        for field in ("inputs", "collate", "schedule", "showcase"):
            _require_callable(field, getattr(self, field), optional=True)
        for field in ("metrics", "finish"):
            for name, function in getattr(self, field).items():
                _require_callable(f"{field}[{name!r}]", function, optional=False)
        if "loss" in self.metrics:
            raise JobError(
                "metrics has an entry 'loss'",
                cause="the held-out loss is always measured under that name",
                next_step="give the metric another name",
            )
        for name in self.finish:
            if name != "loss" and name not in self.metrics:
                raise JobError(
                    f"finish has an entry {name!r}, which is no metric",
                    next_step=f"use one of: {', '.join(['loss', *self.metrics])}",
                )
        _require_positive_int("batch_size", self.batch_size, optional=False)
        for field in (
            "epochs",
            "steps",
            "evaluate_every_steps",
            "evaluation_batch_size",
            "tokens_per_sample",
        ):
            _require_positive_int(field, getattr(self, field), optional=True)
        if (
            isinstance(self.loader_workers, bool)
            or not isinstance(self.loader_workers, int)
            or self.loader_workers < 0
        ):
            raise JobError(
                f"Job: loader_workers is {self.loader_workers!r}",
                next_step="give a whole number of at least 0",
            )
        if self.clip_norm is not None and not self.clip_norm > 0:
            raise JobError(
                f"clip_norm is {self.clip_norm!r}",
                next_step="give a positive number, or None to leave gradients as they are",
            )


def _require_callable(field: str, value: object, *, optional: bool) -> None:
    if callable(value) or (optional and value is None):
        return
    hint = "pass the function itself, not the result of calling it" if field == "model" else "pass a function"
    raise JobError(f"Job: {field} is {type(value).__name__}, not a function", next_step=hint)


def _require_positive_int(field: str, value: object, *, optional: bool) -> None:
    if optional and value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise JobError(
            f"Job: {field} is {value!r}",
            next_step=f"give {field} a whole number of at least 1",
        )
