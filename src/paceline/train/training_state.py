"""All that a training has come to, whole and on rank 0: from it any layout goes on as if it had trained all along.

Not in it, as they follow from the job, the seed and the number of steps: random numbers and the order of the data. Nor
what a model keeps beside its parameters and buffers, or an optimizer outside of its state: attributes of its own.
"""

from __future__ import annotations

import copy
import dataclasses
import pickle
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.comm.wire import as_bytes
from paceline.train import optimizer_state
from paceline.train.held_model import HeldModel
from paceline.train.moving import Pieces, gather_objects
from paceline.train.optimizer_state import OptimizerState


@dataclasses.dataclass
class TrainingState:
    """On rank 0 everything, in memory of its own on the CPU; on others nothing."""

    num_steps: int = 0
    parameters: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    """By name, also those that are not trained."""
    buffers: dict[str, torch.Tensor] = dataclasses.field(default_factory=dict)
    optimizer: OptimizerState = dataclasses.field(default_factory=OptimizerState)
    scheduler: dict[str, Any] | None = None
    """None where the job has none, or one without `state_dict`."""


def collect(held: HeldModel, scheduler: Any, num_steps: int, group: Group) -> TrainingState:
    """The state of the training that the workers of `group` have between them. A collective call.

    Raises:
        LayoutError: the optimizer keeps something that cannot be made whole.
    """
    found = TrainingState(
        num_steps, optimizer=optimizer_state.collect(held.optimizer, held.trained_pieces(), group)
    )
    values = Pieces(group, held.value_pieces())
    for name in values.names:
        whole = values.collect(name, lambda piece: piece.tensor, values.dtype(name))
        if whole is not None:
            found.parameters[name] = whole
    for name, buffer in held.state.buffers():
        if group.rank == 0:
            found.buffers[name] = buffer.detach().cpu().clone()
    if group.rank == 0 and hasattr(scheduler, "state_dict"):
        found.scheduler = copy.deepcopy(scheduler.state_dict())
    return found


def load(state: TrainingState | None, held: HeldModel, scheduler: Any, group: Group) -> int:
    """Go on from what rank 0 has, in a model and an optimizer that are split already. A collective call.

    Returns:
        The number of steps that were made.
    """
    told = None if state is None or group.rank != 0 else (state.num_steps, state.scheduler)
    num_steps, scheduled = gather_objects(group, told, "the state of the training")[0]
    values = Pieces(group, held.value_pieces())
    with torch.no_grad():
        for name in values.names:
            piece = values.own.get(name)
            whole = None if state is None or group.rank != 0 else state.parameters[name]
            values.hand_out(name, whole, None if piece is None else piece.tensor, values.dtype(name))
        held.refresh()
        for name, buffer in held.model.named_buffers():
            if state is not None and group.rank == 0:
                buffer.copy_(state.buffers[name])
            if group.size > 1 and buffer.numel():
                sent = buffer.detach().contiguous()
                group.broadcast_(as_bytes(sent), name)
                buffer.copy_(sent)
    if hasattr(scheduler, "load_state_dict"):
        scheduler.load_state_dict(scheduled)
    elif scheduler is not None:
        for _ in range(num_steps):
            scheduler.step()
    # After the schedule, which may have set what is in the groups.
    optimizer_state.load(
        None if state is None else state.optimizer, held.optimizer, held.trained_pieces(), group
    )
    return int(num_steps)


def why_not_movable(held: HeldModel, scheduler: Any) -> str:
    """Why the training cannot change its layout, as far as this worker knows; empty if it can."""
    reason = optimizer_state.why_not_movable(held.optimizer, held.trained_pieces())
    if reason:
        return f"the optimizer's state cannot be moved: {reason}"
    try:
        pickle.dumps(scheduler.state_dict() if hasattr(scheduler, "state_dict") else None)
    except Exception as error:  # objects of the user's program may raise anything
        return f"the schedule's state cannot be sent to another worker ({error})"
    return ""


def num_bytes(held: HeldModel) -> int:
    """Of what this worker has of parameters, and of its optimizer's state."""
    tensors = [piece.tensor for piece in held.value_pieces()]
    for values in held.optimizer.state.values():
        tensors += [value for value in values.values() if isinstance(value, torch.Tensor)]
    return sum(tensor.nbytes for tensor in tensors)
