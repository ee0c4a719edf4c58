"""What a forward of a model reads and holds, piece by piece: parameters, and what is saved for the backward pass."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from paceline.split.pieces import Piece
from paceline.split.tensor_mode import reads_no_values
from paceline.split.trees import map_arguments, tensors_in
from paceline.train.passes import CLOSING, Call, without_node


class Reads(TorchFunctionMode):
    """Notes of which parameters functions of torch read values, within a call of a piece and between them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside: list[nn.Parameter] = []
        self.between: list[nn.Parameter] = []
        self._place = self.between

    @contextlib.contextmanager
    def within(self) -> Iterator[None]:
        """A call of a piece."""
        self.inside = self._place = []
        try:
            yield
        finally:
            self._place = self.between

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def see(tensor: torch.Tensor) -> torch.Tensor:
            if isinstance(tensor, nn.Parameter):
                self._place.append(tensor)
            return tensor

        if not reads_no_values(func):
            map_arguments((args, kwargs or {}), see)
        return func(*args, **(kwargs or {}))


class Holding:
    """What is saved for the backward pass, each memory counted once; parameters are not counted."""

    def __init__(self, parameters: dict[int, nn.Parameter]) -> None:
        self._parameters = parameters
        # A weak reference keeps an address from being given away again.
        self._seen: dict[int, StorageWeakRef] = {}
        self._saved: list[int] = []
        self._first = 0

    def hooks(self) -> contextlib.AbstractContextManager[Any]:
        """Within them it is counted."""
        return torch.autograd.graph.saved_tensors_hooks(self._note, lambda tensor: tensor)

    def _note(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._seen and storage._cdata not in self._parameters:
            self._seen[storage._cdata] = StorageWeakRef(storage)
            self._saved.append(storage.nbytes())
        return without_node(tensor)

    @contextlib.contextmanager
    def call(self) -> Iterator[None]:
        """A call of a piece, described next."""
        self._first = len(self._saved)
        yield

    def describe(
        self, piece: Piece, own: list[nn.Parameter], args: Any, kwargs: Any, outputs: Any, samples: int
    ) -> Call:
        """As `Passes.describe`; calls whose arguments or results need other gradients are of another kind, too."""
        given = [t for t in tensors_in((args, kwargs)) if t.untyped_storage()._cdata not in self._parameters]
        results = tensors_in(outputs)
        input_bytes, output_bytes = (sum(t.nbytes for t in tensors) for tensors in (given, results))
        shapes = tuple((p.shape, p.dtype, p.requires_grad) for p in own)
        gradients = tuple(t.requires_grad for t in (*given, *results))
        return Call(
            name=piece.name,
            kind=(type(piece.module), shapes, input_bytes, output_bytes, gradients),
            parameter_bytes=sum(p.nbytes for p in own),
            trained_bytes=sum(p.nbytes for p in own if p.requires_grad),
            saved_bytes=sum(self._saved[self._first :]) / samples,
            input_bytes=input_bytes / samples,
            output_bytes=output_bytes / samples,
            channels=tuple(m.num_features for m in piece.module.modules() if isinstance(m, _BatchNorm)),
        )

    def rest(self, around: list[nn.Parameter], calls: list[Call], samples: int) -> Call:
        """What is around the calls."""
        return Call(
            name="loss",
            kind=CLOSING,
            parameter_bytes=sum(p.nbytes for p in around),
            trained_bytes=sum(p.nbytes for p in around if p.requires_grad),
            saved_bytes=max(0.0, sum(self._saved) / samples - sum(call.saved_bytes for call in calls)),
            input_bytes=calls[-1].output_bytes,
            output_bytes=0.0,
        )
