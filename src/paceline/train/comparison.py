"""How far one step is from what it should be: loss, gradients, updated parameters and buffers."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping

import torch

from paceline.records import Difference

_FLOOR = 1e-2
"""A gradient that is small beside the model's whole gradient is held against this share of that."""
_ROUNDING = 4 * torch.finfo(torch.float32).eps
"""Relative rounding of a parameter, which may be large beside its update."""
_NUM_SHOWN = 8

Tensors = Mapping[str, torch.Tensor | None]


@dataclasses.dataclass
class Observed:
    """One step of one side. Tensors by the names that the model gives its parameters and buffers."""

    loss: float
    grad_norm: float | None
    """Before clipping; None where the job does not clip."""
    samples: int
    gradients: Tensors
    """As the optimizer got them: averaged over the global batch, and clipped where the job clips."""
    before: Tensors
    parameters: Tensors
    buffers: Tensors


def compare(step: int, seen: Observed, wanted: Observed) -> list[Difference]:
    """How far each quantity of a step is from what it should be.

    Errors are norms of differences, relative to: the loss; the norm; the parameter's gradient, or 1 % of the whole
    gradient where that is more; the parameter's update, rounding of the parameter left out; the buffer, or
    0.01 for each of its numbers where that is more.
    """
    loss_error = abs(seen.loss - wanted.loss) / max(abs(wanted.loss), 1e-30)
    differences = [_difference("loss", "", step, loss_error)]
    if wanted.grad_norm is not None and seen.grad_norm is not None:
        # Clipping would hide a factor that all gradients have in common.
        error = abs(seen.grad_norm - wanted.grad_norm) / max(wanted.grad_norm, 1e-30)
        differences.append(_difference("gradient norm", "", step, error))
    whole = math.sqrt(sum(_norm(g) ** 2 for g in wanted.gradients.values() if g is not None))
    for name, gradient in wanted.gradients.items():
        found = seen.gradients.get(name)
        if gradient is None or found is None:
            if gradient is not found:
                note = "no gradient" if found is None else "a gradient where one process has none"
                differences.append(Difference(kind="gradient", name=name, step=step, note=note))
            continue
        scale = max(_norm(gradient), _FLOOR * whole, 1e-30)
        differences.append(_difference("gradient", name, step, _distance(found, gradient) / scale))
    for name, parameter in wanted.parameters.items():
        found, before = seen.parameters[name], wanted.before[name]
        assert parameter is not None
        assert found is not None
        assert before is not None
        update, distance = _distance(parameter, before), _distance(found, parameter)
        beyond_rounding = max(0.0, distance - _ROUNDING * _norm(parameter))
        error = beyond_rounding / update if update else (math.inf if beyond_rounding else 0.0)
        differences.append(
            _difference("parameter", name, step, error if math.isfinite(distance) else distance)
        )
    for name, buffer in wanted.buffers.items():
        found = seen.buffers[name]
        assert buffer is not None
        assert found is not None
        scale = max(_norm(buffer), _FLOOR * math.sqrt(buffer.numel()), 1e-30)
        differences.append(_difference("buffer", name, step, _distance(found, buffer) / scale))
    return differences


def _difference(kind: str, name: str, step: int, error: float) -> Difference:
    if math.isfinite(error):
        return Difference(kind=kind, name=name, step=step, relative_error=error)
    return Difference(kind=kind, name=name, step=step, note="not finite, or changed where nothing should")


def badness(difference: Difference) -> float:
    """What differences are sorted by: those that no number can say are the worst."""
    return math.inf if difference.relative_error is None else difference.relative_error


def worst_of_each_kind(differences: Iterable[Difference]) -> tuple[Difference, ...]:
    """The worst few of all, and the worst of each kind; the worst first."""
    kept: list[Difference] = []
    kinds: set[str] = set()
    for difference in differences:
        if len(kept) < _NUM_SHOWN or difference.kind not in kinds:
            kept.append(difference)
            kinds.add(difference.kind)
    return tuple(kept)


def _norm(tensor: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(tensor.double()))


def _distance(a: torch.Tensor, b: torch.Tensor) -> float:
    return float(torch.linalg.vector_norm(a.double() - b.double()))
