"""What the pieces of other pipeline stages would return, from the shapes of what they are given."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call

from paceline.errors import SplitError
from paceline.split.exchange import silent
from paceline.split.formats import memory_format_of
from paceline.split.pieces import Piece
from paceline.split.tensor_mode import mark, plainly, shard_of
from paceline.split.trees import flatten


class AbsentPieces:
    """What the pieces of other stages would return, from the shapes of what they are given."""

    def __init__(self) -> None:
        self._known: dict[Any, tuple[list[Any], Callable[[list[Any]], Any]]] = {}

    def outputs(
        self,
        piece: Piece,
        forward: Callable[..., Any],
        leaves: list[Any],
        restore: Callable[[list[Any]], Any],
    ) -> Any:
        """Absent tensors in the structure that the piece returns; what it hands through is that which it was given.

        Args:
            leaves, restore: the piece's `(args, kwargs)`, flat.
        """
        with plainly():
            key = (piece.name, torch.is_grad_enabled(), piece.module.training, *map(_signature, leaves))
        if key not in self._known:
            with silent():
                self._known[key] = self._find_out(piece, forward, leaves, restore)
        described, rebuild = self._known[key]
        with plainly():
            return rebuild(
                [leaf.make(leaves) if isinstance(leaf, _Output | _Given) else leaf for leaf in described]
            )

    def _find_out(
        self,
        piece: Piece,
        forward: Callable[..., Any],
        leaves: list[Any],
        restore: Callable[[list[Any]], Any],
    ) -> tuple[list[Any], Callable[[list[Any]], Any]]:
        try:
            try:
                with FakeTensorMode(allow_non_fake_inputs=True), _quietly():
                    return _describe(piece, forward, leaves, restore, torch.empty)
            except Exception:
                # What it does depends on values: it is run once on zeros, with weights of zero.
                return _describe(piece, forward, leaves, restore, torch.zeros)
        except Exception as error:
            raise SplitError(
                f"the model cannot be cut into pipeline stages: what {piece.name} returns cannot be told from the "
                "shapes of what it is given",
                cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                next_step="use another axis (dp_shard, tp)",
            ) from error


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """torch logs what a fake tensor cannot do; it is tried in another way then."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


def _describe(
    piece: Piece,
    forward: Callable[..., Any],
    leaves: list[Any],
    restore: Callable[[list[Any]], Any],
    make: Callable[..., torch.Tensor],
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Run the piece on tensors that `make` makes, and say what it returns."""
    module = Calling(piece.module, forward)
    with plainly():
        stand_ins = [_stand_in(leaf, make) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
        state = {n: _stand_in(t, make) for n, t in (*module.named_parameters(), *module.named_buffers())}
    args, kwargs = restore(stand_ins)
    found, rebuild = flatten(functional_call(module, state, args, kwargs))
    given = {id(t): number for number, t in enumerate(stand_ins) if _is_object(t)}
    with plainly():
        described = [
            _Given(given[id(leaf)])
            if id(leaf) in given
            else _Output(
                tuple(leaf.shape), leaf.dtype, leaf.requires_grad, shard_of(leaf), memory_format_of(leaf)
            )
            if isinstance(leaf, torch.Tensor)
            else leaf
            for leaf in found
        ]
    return described, rebuild


def _is_object(value: Any) -> bool:
    """Whether two of them are the same only if they are one."""
    return value is not None and not isinstance(value, bool | int | float | str)


class Calling(nn.Module):
    """Calls a piece's forward, so that its parameters can be stood in for."""

    def __init__(self, module: nn.Module, forward: Callable[..., Any]) -> None:
        super().__init__()
        self.module = module
        self._call = forward

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Output:
    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shard: Any
    memory_format: torch.memory_format

    def make(self, leaves: list[Any]) -> torch.Tensor:
        tensor = torch.empty(self.shape, dtype=self.dtype, device="meta", memory_format=self.memory_format)
        if self.requires_grad:
            # No leaf: the code between the pieces may change it in place.
            tensor = tensor.requires_grad_().clone()
        return mark(tensor, self.shard)


@dataclasses.dataclass(frozen=True)
class _Given:
    number: int

    def make(self, leaves: list[Any]) -> Any:
        return leaves[self.number]


def _stand_in(tensor: torch.Tensor, make: Callable[..., torch.Tensor]) -> torch.Tensor:
    device = "cpu" if tensor.is_meta else tensor.device
    new = make(tensor.shape, dtype=tensor.dtype, device=device)
    new = new.contiguous(memory_format=memory_format_of(tensor))
    if isinstance(tensor, nn.Parameter):
        # Rules know a weight by its class.
        new = nn.Parameter(new, requires_grad=tensor.requires_grad)
    elif tensor.requires_grad:
        new = new.requires_grad_().clone()
    return mark(new, shard_of(tensor))


def _signature(leaf: Any) -> Any:
    if isinstance(leaf, torch.Tensor):
        return tuple(leaf.shape), leaf.dtype, leaf.requires_grad, shard_of(leaf), memory_format_of(leaf)
    if leaf is None or isinstance(leaf, bool | int | float | str):
        return leaf
    return type(leaf).__name__
