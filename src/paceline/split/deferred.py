"""Parameters that get their values when they are wanted: a model is built, and no worker has the whole of it.

Such a parameter is an ordinary one, on the device and of the type that it will have, whose memory is given back. It
must not be read then: torch would read memory that is not there. While a model is looked through to find out where it
can be split, parameters are lent their values, those of one piece at a time.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from paceline.split.pieces import Piece
from paceline.split.recording import LEAST_BYTES, CannotRecordError, Place, Recording
from paceline.split.tensor_mode import plainly, reads_no_values
from paceline.split.trees import map_arguments


class DeferredParameters:
    """The parameters of one model that have no values yet, and where their values come from."""

    def __init__(self) -> None:
        self._recording: Recording | None = None
        self._places: dict[nn.Parameter, Place] = {}
        self.digest = ""
        """Equal on workers that would fill in the same values; empty where there is nothing to fill in."""

    def __contains__(self, parameter: Any) -> bool:
        return parameter in self._places

    def __len__(self) -> int:
        return len(self._places)

    def add(self, recording: Recording, places: dict[nn.Parameter, Place]) -> None:
        self._recording, self._places, self.digest = recording, places, recording.digest()

    def fill(self, parameter: torch.Tensor) -> bool:
        """Give it its memory and values, if it has none; whether it had none."""
        with plainly(), torch.no_grad():
            place = self._places.get(parameter)  # type: ignore[call-overload]
            storage = parameter.untyped_storage()
            if place is None or storage.nbytes():
                return False
            assert self._recording is not None
            storage.resize_(_nbytes(parameter))
            parameter.copy_(self._recording.values(place))
        return True

    def release(self, parameter: torch.Tensor) -> None:
        """Take its memory back."""
        with plainly():
            if parameter in self._places:
                parameter.untyped_storage().resize_(0)

    @contextlib.contextmanager
    def filled(self, parameters: Iterable[torch.Tensor]) -> Iterator[None]:
        """Within it they have values."""
        lent = [p for p in parameters if self.fill(p)]
        try:
            yield
        finally:
            for parameter in lent:
                self.release(parameter)

    @contextlib.contextmanager
    def lending(self) -> Iterator[Callable[[Piece], contextlib.AbstractContextManager[None]]]:
        """Within it, what is read between the pieces of a model gets its values when it is first read, and keeps them.

        Yields:
            What to run a piece in.
        """
        guard = _Lending(self)
        try:
            with guard if self._places else contextlib.nullcontext():
                yield lambda piece: self.filled(piece.module.parameters())
        finally:
            for parameter in guard.lent:
                self.release(parameter)

    def settle(self, parameters: Iterable[nn.Parameter]) -> None:
        """These have their values from now on; all others are gone for good."""
        for parameter in parameters:
            self.fill(parameter)
        self._places, self._recording = {}, None


class _Lending(TorchFunctionMode):
    """Gives parameters their values when a function of torch reads them."""

    def __init__(self, deferred: DeferredParameters) -> None:
        super().__init__()
        self._deferred = deferred
        self.lent: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        def see(tensor: torch.Tensor) -> torch.Tensor:
            if tensor in self._deferred:
                with plainly():
                    if self._deferred.fill(tensor):
                        self.lent.append(tensor)
            return tensor

        if not reads_no_values(func):
            map_arguments((args, kwargs or {}), see)
        return func(*args, **(kwargs or {}))


def _nbytes(tensor: torch.Tensor) -> int:
    if not tensor.numel():
        return 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def build_deferred(
    make: Callable[[], nn.Module],
    device: torch.device,
    dtype: torch.dtype | None,
    *,
    least_bytes: int | None = None,
) -> tuple[nn.Module, DeferredParameters]:
    """Call `make`, and keep what is large of the model's parameters out of memory.

    Args:
        device, dtype: where the parameters shall be, and the type of those that have a point; None: as they are.
        least_bytes: smaller parameters have their values at once; None: `LEAST_BYTES`.

    Raises:
        CannotRecordError: it does what cannot be repeated. Other errors of its own may come of that, too.
    """
    recording = Recording(least_bytes=LEAST_BYTES if least_bytes is None else least_bytes)
    deferred = DeferredParameters()
    with warnings.catch_warnings(), recording:
        # A deep copy of a tensor asks for its address.
        warnings.filterwarnings("ignore", message="Accessing the data pointer of FakeTensor")
        model = make()
    if not isinstance(model, nn.Module):
        return model, deferred
    recording.finish()
    places: dict[nn.Parameter, Place] = {}
    entries: list[tuple[nn.Module, str, nn.Parameter]] = []
    stand_ins: dict[int, nn.Parameter] = {}
    old: list[weakref.ref[torch.Tensor]] = []
    others = _fill_attributes(model, recording)
    for module in model.modules():
        for name, parameter in module._parameters.items():
            place = None if parameter is None else recording.place(parameter)
            if parameter is None or place is None:
                continue
            if id(parameter) not in stand_ins:
                if recording.is_arbitrary(place):
                    raise CannotRecordError("a parameter was never written to")
                new = _without_memory(parameter, device, dtype)
                stand_ins[id(parameter)], places[new] = new, place
                old.append(weakref.ref(parameter))
            entries.append((module, name, stand_ins[id(parameter)]))
            module._parameters[name] = None
    storages = [place.storage for place in places.values()] + others
    if len(set(storages)) < len(storages):
        raise CannotRecordError("tensors of the model share their memory")
    del module, parameter
    # Everything else is moved as PyTorch does it.
    model.to(device=device, dtype=dtype)
    for module, name, new in entries:
        setattr(module, name, new)
    if any(True for _ in recording.living()) or any(handle() is not None for handle in old):
        gc.collect()
        if any(True for _ in recording.living()) or any(handle() is not None for handle in old):
            raise CannotRecordError("something beside the model holds a large tensor of it")
    if places:
        deferred.add(recording, places)
    return model, deferred


def _without_memory(parameter: nn.Parameter, device: torch.device, dtype: torch.dtype | None) -> nn.Parameter:
    kind = dtype if dtype is not None and parameter.dtype.is_floating_point else parameter.dtype
    meta = torch.empty_strided(parameter.shape, parameter.stride(), dtype=kind, device="meta")
    new = nn.Parameter(torch.empty_like(meta, device=device), requires_grad=parameter.requires_grad)
    new.untyped_storage().resize_(0)
    # What the user's program has attached to it.
    new.__dict__.update({k: v for k, v in vars(parameter).items() if k not in _fake_attributes()})
    return new


@functools.cache
def _fake_attributes() -> set[str]:
    fake = FakeTensor(FakeTensorMode(), torch.empty(1, device="meta"), torch.device("cpu"))
    return set(vars(nn.Parameter(fake)))


def _fill_attributes(model: nn.Module, recording: Recording) -> list[int]:
    """Give buffers, and tensors that are attributes of modules, their values: they are not divided.

    Returns:
        The storages that they were recorded in.
    """
    known: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    storages: list[int] = []

    def value(tensor: torch.Tensor) -> torch.Tensor:
        place = recording.place(tensor)
        if place is None:
            return tensor
        if id(tensor) not in known:
            known[id(tensor)] = tensor, recording.values(place)
            storages.append(place.storage)
        return known[id(tensor)][1]

    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = value(buffer)
        for name, held in list(vars(module).items()):
            if name not in ("_parameters", "_buffers", "_modules") and not isinstance(held, nn.Parameter):
                found: list[torch.Tensor] = []
                map_arguments(held, found.append)
                if any(not isinstance(t, nn.Parameter) and recording.place(t) is not None for t in found):
                    vars(module)[name] = map_arguments(held, value)
    return storages
