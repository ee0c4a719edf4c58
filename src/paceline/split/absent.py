"""What other pipeline stages would return, from the shapes of what they are given: their pieces, and calls to torch."""

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
from paceline.split.trees import flatten, map_arguments, tensors_in


class AbsentPieces:
    """What the pieces of other stages would return, from the shapes of what they are given."""

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: of what is not absent: a piece may be given both, and none computes on two devices.
        """
        self._device = device
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
                    return _describe(piece, forward, leaves, restore, torch.empty, self._device)
            except Exception:
                # What it does depends on values: it is run once on zeros, with weights of zero.
                return _describe(piece, forward, leaves, restore, torch.zeros, self._device)
        except Exception as error:
            raise SplitError(
                f"the model cannot be cut into pipeline stages: what {piece.name} returns cannot be told from the "
                "shapes of what it is given",
                cause=f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}",
                next_step="use another axis (dp_shard, tp)",
            ) from error


class AbsentCalls:
    """What calls to torch return where some of their tensors are absent.

    torch's meta device takes a tenth of a millisecond for a sum (docs/log.md), so a call is made there once for each
    way of calling it; after that its results are made from their shapes. Views are made anew each time, since what is
    written into one of them changes the others, and so is whatever is no new tensor.
    """

    def __init__(self, device: torch.device) -> None:
        """
        Args:
            device: of what is not absent.
        """
        self._device = device
        self._known: dict[Any, _Result | tuple[type, list[_Result]] | None] = {}
        """None: it has to be called."""

    def result(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """What `func` returns, with absent tensors for tensors.

        Args:
            args, kwargs: with tensors that are absent, and others.
        """
        with plainly():
            called = _key_of((args, kwargs))
            modes = torch.is_grad_enabled(), torch.is_autocast_enabled(self._device.type)
            key = None if called is None else (func, *modes, called)
            known = self._known.get(key)
            if known is not None:
                if isinstance(known, _Result):
                    return known.make()
                kind, results = known
                return kind(one.make() for one in results)
            args, kwargs = (map_arguments(a, _on_meta, _MOVED) for a in (args, kwargs))
        result = _shape_of(func, args, kwargs)
        if key is not None and key not in self._known:
            with plainly():
                if len(self._known) >= _MOST_KNOWN:  # an argument is another one in each step
                    self._known.clear()
                self._known[key] = _described(result, tensors_in((args, kwargs)))
        return result


_MOVED = (torch.Tensor, torch.device)
"""Arguments that are others where tensors have shapes only."""
_MOST_KNOWN = 4096
_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format, torch.layout)


def _key_of(value: Any) -> Any:
    """Equal for arguments with which a call does the same to shapes; None where that cannot be told."""
    if isinstance(value, torch.Tensor):
        if value.layout is not torch.strided:
            return None
        lies = tuple(value.shape), value.stride(), value.dtype, value.requires_grad
        return *lies, shard_of(value), type(value)
    if value is None or value is Ellipsis:
        return (value,)
    if isinstance(value, _PLAIN):
        return type(value), value
    if isinstance(value, slice):
        return _key_of(("slice", value.start, value.stop, value.step))
    if isinstance(value, dict):
        return _key_of(tuple(value.items()))
    if isinstance(value, tuple | list):
        keys = tuple(map(_key_of, value))
        return None if None in keys else (type(value), *keys)
    return None


def _described(result: Any, given: list[torch.Tensor]) -> _Result | tuple[type, list[_Result]] | None:
    """How to make what a call returned; None: it cannot be made from shapes."""
    if isinstance(result, torch.Tensor):
        return _Result.of(result, given)
    if type(result) not in (tuple, list):
        return None
    found = [_Result.of(one, given) if isinstance(one, torch.Tensor) else None for one in result]
    known = [one for one in found if one is not None]
    if not known or len(known) < len(found) or len({t.untyped_storage()._cdata for t in result}) < len(found):
        return None
    return type(result), known


@dataclasses.dataclass(frozen=True)
class _Result:
    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool
    shard: Any

    @classmethod
    def of(cls, tensor: torch.Tensor, given: list[torch.Tensor]) -> _Result | None:
        """None where it shares memory with what the call was given, or is no plain tensor."""
        if type(tensor) is not torch.Tensor or not tensor.is_meta or tensor.layout is not torch.strided:
            return None
        storage = tensor.untyped_storage()._cdata
        if tensor.is_leaf == tensor.requires_grad or any(
            storage == t.untyped_storage()._cdata for t in given
        ):
            return None
        new = cls(tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.requires_grad, shard_of(tensor))
        return new if new.make().stride() == new.stride else None

    def make(self) -> torch.Tensor:
        tensor = torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")
        if self.requires_grad:
            # No leaf: the code between the pieces may change it in place.
            tensor = tensor.requires_grad_().clone()
        return mark(tensor, self.shard)


def _shape_of(func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """What a function returns where tensors have shapes only."""
    try:
        return func(*args, **kwargs)
    except (RuntimeError, NotImplementedError) as error:
        raise SplitError(
            f"the model cannot be cut into pipeline stages: it calls {getattr(func, '__name__', func)} between its "
            "blocks on a value that another stage computes",
            cause=str(error).splitlines()[0],
            next_step="use another axis (dp_shard, tp), or move that code into a block",
        ) from error


def _on_meta(value: Any) -> Any:
    """An argument, or a device to go to, as it is where tensors have shapes only."""
    return _as_meta(value) if isinstance(value, torch.Tensor) else torch.device("meta")


def _as_meta(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_meta:
        return tensor
    meta = torch.empty_like(tensor, device="meta", requires_grad=False)
    if tensor.requires_grad:
        meta = meta.requires_grad_().clone()
    return mark(meta, shard_of(tensor))


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
    device: torch.device,
) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """Run the piece on tensors that `make` makes, those of absent ones on `device`, and say what it returns."""
    module = Calling(piece.module, forward)
    with plainly():
        stand_ins = [
            _stand_in(leaf, make, device) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves
        ]
        tensors = (*module.named_parameters(), *module.named_buffers())
        state = {name: _stand_in(tensor, make, device) for name, tensor in tensors}
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


def _stand_in(tensor: torch.Tensor, make: Callable[..., torch.Tensor], device: torch.device) -> torch.Tensor:
    new = make(tensor.shape, dtype=tensor.dtype, device=device if tensor.is_meta else tensor.device)
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
