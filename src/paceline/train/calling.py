"""Calling the model as the job says, and reading what its loss and metrics return."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from paceline.errors import LossError
from paceline.job import Job


def sum_and_weight(name: str, value: Any, samples: int) -> torch.Tensor:
    """`[sum, weight]` from either form of a loss or metric; a mean counts for `samples`."""
    if isinstance(value, tuple):
        total, weight = value
        return torch.tensor([float(total), float(weight)], dtype=torch.float64)
    if isinstance(value, torch.Tensor):
        require_scalar(value, f"the metric {name!r}", needs_gradient=False)
    return torch.tensor([float(value) * samples, float(samples)], dtype=torch.float64)


def require_scalar(value: Any, what: str, *, needs_gradient: bool = True) -> None:
    if not isinstance(value, torch.Tensor):
        raise LossError(
            f"{what} is {type(value).__name__}, not a tensor",
            next_step="return a scalar tensor, or a tuple (sum, weight) of two",
        )
    if value.numel() != 1:
        raise LossError(
            f"{what} has shape {tuple(value.shape)}, not a scalar",
            cause="a loss with reduction='none', or a missing .mean()",
            next_step="return the mean over the batch, or a tuple (sum, weight)",
        )
    if needs_gradient and not value.requires_grad:
        raise LossError(
            f"{what} does not depend on the model's parameters",
            cause="computed under no_grad, from .detach() or .item(), or by a function without a gradient",
            next_step="compute it from the model's outputs",
        )


def caller(job: Job, model: nn.Module) -> Callable[[Any], Any]:
    """`(batch) -> outputs`: the model called with the batch's inputs, by the job's rule or the default one."""
    accepted = _keyword_names(model)

    def inputs_of(batch: Any) -> Any:
        if job.inputs is not None:
            return job.inputs(batch)
        if isinstance(batch, Mapping):
            return {k: v for k, v in batch.items() if accepted is None or k in accepted}
        if isinstance(batch, tuple | list):
            return batch[0]
        return batch

    def call(batch: Any) -> Any:
        inputs = inputs_of(batch)
        if isinstance(inputs, tuple):
            return model(*inputs)
        if isinstance(inputs, Mapping):
            return model(**inputs)
        return model(inputs)

    return call


def _keyword_names(model: nn.Module) -> set[str] | None:
    """Names that `model.forward` takes; None where it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name for p in parameters}
