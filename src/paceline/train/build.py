"""The job's model and its optimizer, as a script would build them, or without the memory for all of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.errors import JobError
from paceline.job import Job
from paceline.split.deferred import DeferredParameters, build_deferred
from paceline.split.swap import swap_parameters
from paceline.train.allocator import give_back_freed_memory
from paceline.train.seeds import derive, seed_everything


def build_model(
    job: Job, seed: int, device: torch.device, dtype: torch.dtype | None, *, in_parts: bool
) -> tuple[nn.Module, DeferredParameters]:
    """The job's model; the same, bit for bit, whether or not it is built `in_parts`.

    Args:
        in_parts: leave large parameters without memory, if the job's program allows it; it need not be known
            why it does not: then the model is built as it always is.

    Raises:
        JobError: it is no model.
    """
    if in_parts:
        seed_everything(derive(seed, "model"))
        try:
            model, deferred = build_deferred(job.model, device, dtype)
        except Exception:
            deferred = DeferredParameters()
        else:
            _require_module(model)
            give_back_freed_memory()
            return model, deferred
    seed_everything(derive(seed, "model"))
    model = job.model()
    _require_module(model)
    model.to(device=device, dtype=dtype)
    return model, DeferredParameters()


def _require_module(model: Any) -> None:
    if not isinstance(model, nn.Module):
        raise JobError(
            f"Job: model() returned {type(model).__name__}",
            next_step="return an nn.Module",
        )


def everyone_fills_alike(deferred: DeferredParameters, group: Group) -> bool:
    """Whether all workers would give the deferred parameters the same values. A collective call.

    Not where the job's program differs between them (it reads the time, or the rank), nor on unequal processors,
    whose random numbers may differ in the last bit: then all are to be filled, and sent out by rank 0.
    """
    digests = group.gather_json(deferred.digest, "how the model was built")
    return len(set(digests)) == 1


def build_optimizer(job: Job, parameters: Sequence[nn.Parameter], deferred: DeferredParameters) -> Any:
    """The job's optimizer, of all `parameters`.

    In place of those that have no values it is built on tensors of their shape that take no memory and are not
    numbers: should it make something of them, they are filled, and it is built anew.
    """
    if not len(deferred):
        return job.optimizer(list(parameters))
    stand_ins = {p: _stand_in(p) if p in deferred else p for p in parameters}
    optimizer = job.optimizer([stand_ins[p] for p in parameters])
    if any(_reads_values(state) for state in optimizer.state.values()):
        deferred.settle(parameters)
        return job.optimizer(list(parameters))
    swap_parameters(optimizer, {new: (old, _as_it_is) for old, new in stand_ins.items() if new is not old})
    return optimizer


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    nan = torch.full((), float("nan"), dtype=parameter.dtype, device=parameter.device)
    new = nn.Parameter(nan.expand(parameter.shape), requires_grad=parameter.requires_grad)
    new.__dict__.update(vars(parameter))
    return new


def _reads_values(state: dict[str, Any]) -> bool:
    return any(
        isinstance(v, torch.Tensor) and v.is_floating_point() and bool(v.isnan().any())
        for v in state.values()
    )


def _as_it_is(tensor: torch.Tensor) -> torch.Tensor:
    return tensor
