"""What would cross a cut after each piece of a model: values that come from before it and are needed behind it."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from paceline.split.trees import map_tensors, tensors_in

_VALUE = "_paceline_value"


@dataclasses.dataclass
class _Value:
    """A tensor outside the pieces."""

    made: int
    """Number of the call that it belongs to."""
    needed: int
    """Of the last call that needs it, or a value that belongs to which is made of it."""
    num_bytes: int


class Crossing(TorchFunctionMode):
    """Follows one forward. Within it, each call of a piece is to be told to `called`.

    A value belongs to the call that it comes from, or, made between calls, to the last of those that what it is made
    of belongs to: where a pipeline computes it (pipeline.py). What comes from the batch alone belongs to none, and is
    never sent. A model may pool, or join, between its pieces, or hand values on past many of them: then a cut is
    crossed by something else than the result of the piece before it.
    """

    def __init__(self, is_inside: Callable[[], bool]) -> None:
        """
        Args:
            is_inside: whether a piece is being computed; what that does is its own.
        """
        super().__init__()
        self._is_inside = is_inside
        self._values: list[_Value] = []
        self.num_calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if self._is_inside() or not tensors_in(result):
            return result
        read = tensors_in((args, kwargs))
        numbers = [value.made for t in read if (value := _value_of(t)) is not None]
        parameters = [t for t in read if isinstance(t, nn.Parameter)]
        number = max(numbers, default=max(self.num_calls - 1, 0))
        if parameters:
            self.read_between(parameters, number)
        if numbers or parameters:
            self._need(read, number)
            map_tensors(result, lambda t: self._made(t, number))
        return result

    def read_between(self, parameters: Sequence[nn.Parameter], number: int) -> None:
        """These are read between the pieces, for a value that belongs to call `number`."""

    def called(self, given: Any, result: Any) -> Any:
        """The next call of a piece has made `result` of `given`, which it returns: what is handed through belongs to
        whom it belonged."""
        number = self.num_calls
        self.num_calls += 1
        arguments = tensors_in(given)
        self._need(arguments, number)
        handed = {id(t) for t in arguments}
        return map_tensors(result, lambda t: t if id(t) in handed else self._made(t, number))

    def returned(self, outputs: Any) -> Any:
        """The model has returned `outputs`, which it returns: the last stage gets them."""
        self._need(tensors_in(outputs), self.num_calls - 1)
        return outputs

    def bytes_after(self) -> list[float]:
        """Of each call: what would cross a cut after it, into two stages; each value once."""
        changes = [0.0] * (self.num_calls + 1)
        for value in self._values:
            changes[value.made] += value.num_bytes
            changes[value.needed] -= value.num_bytes
        return list(itertools.accumulate(changes))[: self.num_calls]

    def _need(self, tensors: Sequence[torch.Tensor], number: int) -> None:
        for tensor in tensors:
            value = _value_of(tensor)
            if value is not None:
                value.needed = max(value.needed, number)

    def _made(self, tensor: torch.Tensor, number: int) -> torch.Tensor:
        before = _value_of(tensor)
        if before is None or before.made != number:
            value = _Value(number, number, tensor.nbytes)
            setattr(tensor, _VALUE, value)
            self._values.append(value)
        return tensor


def _value_of(tensor: torch.Tensor) -> _Value | None:
    return getattr(tensor, _VALUE, None)
