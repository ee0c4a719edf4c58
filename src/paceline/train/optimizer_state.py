"""The state of an optimizer, whole and by the names of the parameters: independent of any layout.

What torch's optimizers keep is a dictionary for each parameter. A tensor in it that has the shape of what the optimizer
trains (momentum, averages of gradients and of their squares) is divided as the parameter is; anything else (numbers of
steps, factors of a matrix) belongs to the whole parameter.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import pickle
from collections.abc import Sequence
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.errors import LayoutError
from paceline.train.moving import Piece, Pieces, gather_objects


@dataclasses.dataclass
class OptimizerState:
    """On rank 0 everything, on the CPU; on others nothing."""

    of: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    """By the names of parameters: what the optimizer knows of each, tensors whole."""
    groups: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    """Settings of each parameter group as they are now, without its parameters."""


@dataclasses.dataclass(frozen=True)
class _Like:
    """Stands for a tensor of the parameter's shape."""

    dtype: torch.dtype


def collect(optimizer: Any, pieces: Sequence[Piece], group: Group) -> OptimizerState:
    """The state of an optimizer of which each worker of `group` has that of its own pieces. A collective call.

    Only what is kept for a parameter, and the settings of the groups: not what a class of its own keeps elsewhere.
    Cost: each number is sent to rank 0 once, whose memory must hold all of it.

    Raises:
        LayoutError: `why_not_movable` says why.
    """
    reason = next(filter(None, group.gather_json(why_not_movable(optimizer, pieces), "optimizer state")), "")
    if reason:
        raise LayoutError(f"the optimizer's state cannot be made whole: {reason}")
    everyone = Pieces(group, pieces)
    told = gather_objects(group, {p.name: _described(optimizer, p) for p in pieces}, "optimizer state")
    found = OptimizerState(groups=_settings(optimizer) if group.rank == 0 else [])
    for name in everyone.names:
        values = told[everyone.first_holder(name)][name]
        for key, value in values.items():
            if isinstance(value, _Like):
                state_of = functools.partial(_state_of, optimizer, key)
                values[key] = everyone.collect(name, state_of, value.dtype)
        if values and group.rank == 0:
            found.of[name] = values
    return found


def load(state: OptimizerState | None, optimizer: Any, pieces: Sequence[Piece], group: Group) -> None:
    """Give each worker's optimizer its part of what rank 0 has. A collective call.

    Args:
        state: on rank 0; on others it is not looked at.
        optimizer: of the same job, in the layout that the pieces belong to.

    Raises:
        LayoutError: what belongs to a whole parameter would come to a part of one.
    """
    everyone = Pieces(group, pieces)
    own = None
    if group.rank == 0:
        assert state is not None
        own = (
            state.groups,
            {
                name: {key: _mark(key, value, everyone.shape(name)) for key, value in values.items()}
                for name, values in state.of.items()
            },
        )
    settings, described = gather_objects(group, own, "optimizer state")[0]
    for target, values in zip(optimizer.param_groups, settings, strict=True):
        target.update(values)
    for own_piece in pieces:
        optimizer.state.pop(own_piece.tensor, None)
    steps_on_device = {
        p for g in optimizer.param_groups if g.get("fused") or g.get("capturable") for p in g["params"]
    }
    for name in everyone.names:
        piece: Piece | None = everyone.own.get(name)
        for key, value in described.get(name, {}).items():
            if isinstance(value, _Like):
                into = None if piece is None else torch.empty_like(piece.tensor, dtype=value.dtype)
                whole = None if state is None or group.rank != 0 else state.of[name][key]
                everyone.hand_out(name, whole, into, value.dtype)
                value = into
            elif piece is not None and _is_part(value) and not piece.is_whole:
                raise LayoutError(f"{key} of {name} belongs to the whole parameter, which is divided here")
            elif piece is not None and isinstance(value, torch.Tensor):
                # As torch's own load_state_dict: steps are counted on the CPU, unless the update reads them elsewhere.
                stays = key == "step" and piece.tensor not in steps_on_device
                value = value if stays else value.to(piece.tensor.device)
            if piece is not None:
                optimizer.state[piece.tensor][key] = value


def why_not_movable(optimizer: Any, pieces: Sequence[Piece]) -> str:
    """Why this worker's part of the state cannot be joined with the others'; empty if it can."""
    named = {piece.tensor: piece for piece in pieces}
    for parameter in optimizer.state:
        if parameter not in named:
            return "there is some that belongs to no parameter of the model"
    for piece in pieces:
        if not piece.is_whole and (keys := _undivided(optimizer, piece)):
            return (
                f"{keys[0]} of {piece.name} is neither a number nor of its shape, and {piece.name} is divided"
            )
    try:
        pickle.dumps([_settings(optimizer), [_described(optimizer, piece) for piece in pieces]])
    except Exception as error:  # objects of the user's program may raise anything
        return f"it cannot be sent to another worker ({error})"
    return ""


def needs_whole_parameters(optimizer: Any, pieces: Sequence[Piece]) -> bool:
    """Whether something is kept here that cannot be divided with its parameter: then no layout may divide that."""
    return any(_undivided(optimizer, piece) for piece in pieces)


def _undivided(optimizer: Any, piece: Piece) -> list[str]:
    values = optimizer.state.get(piece.tensor, {})
    return [k for k, v in values.items() if _is_part(v) and not _is_like(k, v, piece.tensor.shape)]


def _described(optimizer: Any, piece: Piece) -> dict[str, Any]:
    values = optimizer.state.get(piece.tensor, {})
    return {key: _mark(key, value, piece.tensor.shape) for key, value in values.items()}


def _mark(key: str, value: Any, shape: Sequence[int]) -> Any:
    if _is_like(key, value, shape):
        return _Like(value.dtype)
    # A copy of its own: a view would take along all the memory that it looks into.
    return value.detach().cpu().clone() if isinstance(value, torch.Tensor) else value


def _is_like(key: str, value: Any, shape: Sequence[int]) -> bool:
    """Whether it is divided as the parameter. A number of steps is not, even if the parameter is one number, too."""
    return isinstance(value, torch.Tensor) and tuple(value.shape) == tuple(shape) and key != "step"


def _is_part(value: Any) -> bool:
    """Whether it may say something of each of a parameter's numbers, and not the same of all."""
    if isinstance(value, torch.Tensor):
        return value.numel() > 1
    return not isinstance(value, bool | int | float | str | None)


def _state_of(optimizer: Any, key: str, piece: Piece) -> torch.Tensor:
    found: torch.Tensor = optimizer.state[piece.tensor][key]
    return found


def _settings(optimizer: Any) -> list[dict[str, Any]]:
    return [
        {key: copy.deepcopy(value) for key, value in group.items() if key != "params"}
        for group in optimizer.param_groups
    ]
