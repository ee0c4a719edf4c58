"""Building a model without ever having the whole of it in memory, bit for bit as PyTorch builds it.

The user's function runs as it is. Each call of it to torch is made, in order and with the same random numbers, but what
is large does not stay: the program gets a fake tensor, which says that it is on the CPU and has no memory; its values
lie in a cache of limited size, and the calls that made them are written down. Values that left the cache are had again
by repeating those calls, each random one with the generator as it was then. So a worker can have any one
parameter, at any time, without the others.
"""

from __future__ import annotations

import collections
import dataclasses
import hashlib
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from paceline.split.trees import map_arguments, tensors_in

LEAST_BYTES = 4096
"""Smaller tensors are ordinary ones."""
CACHE_BYTES = 64 << 20

_FILLS = frozenset({
    "uniform_", "normal_", "bernoulli_", "random_", "exponential_", "geometric_", "cauchy_", "log_normal_",
    "fill_", "zero_",
})  # fmt: skip
"""They write every element and read none."""
_CHANGES_MEMORY = frozenset({"set_", "resize_", "resize_as_", "set_data"})


class CannotRecordError(Exception):
    """The program does something with a large tensor that cannot be repeated later."""


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a tensor lies in a recorded storage."""

    storage: int
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int

    @classmethod
    def of(cls, tensor: torch.Tensor, storage: int) -> Place:
        return cls(storage, tensor.dtype, tuple(tensor.shape), tensor.stride(), int(tensor.storage_offset()))

    def within(self, storage: torch.UntypedStorage) -> torch.Tensor:
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclasses.dataclass(frozen=True)
class _Call:
    """One call to torch; tensors that are recorded stand as their `Place` in the arguments."""

    func: Any
    args: Any
    kwargs: Any
    makes: tuple[tuple[int, int], ...]
    """(which of its results, flat; the storage that came with it)."""
    writes: frozenset[int]
    reads: frozenset[int]
    """Storages whose values it needs; not one that it fills."""
    generator: torch.Tensor | None
    """State of the random generator before it."""


class Recording(TorchDispatchMode):
    """Within it, large tensors are recorded. Afterwards `values` gives them, one at a time."""

    def __init__(self, *, least_bytes: int = LEAST_BYTES, cache_bytes: int = CACHE_BYTES) -> None:
        super().__init__()
        self._least, self._cache_bytes = least_bytes, cache_bytes
        self._fakes = FakeTensorMode()
        self._calls: list[_Call] = []
        self._history: list[list[int]] = []
        """By storage: the calls that made what it has."""
        self._sizes: list[int] = []
        self._numbers: dict[int, int] = {}
        """By address of the storage that the program sees."""
        self._seen: list[torch.UntypedStorage] = []
        self._cache: collections.OrderedDict[int, torch.UntypedStorage] = collections.OrderedDict()
        self._handles: list[weakref.ref[torch.Tensor]] = []
        self._lent: list[tuple[torch.Tensor, int]] = []
        """Large ordinary tensors that calls read, and their versions."""

    def place(self, tensor: torch.Tensor) -> Place | None:
        """Where it is recorded; None: it is an ordinary tensor."""
        if not isinstance(tensor, FakeTensor):
            return None
        number = self._numbers.get(tensor.untyped_storage()._cdata)
        if number is None:
            raise CannotRecordError("a large tensor was given other memory")
        return Place.of(tensor, number)

    def living(self) -> Iterator[torch.Tensor]:
        """The recorded tensors that the program still has."""
        for handle in self._handles:
            tensor = handle()
            if tensor is not None:
                yield tensor

    def finish(self) -> None:
        """After the program: forget the values.

        Raises:
            CannotRecordError: a large tensor that was read has changed since.
        """
        self._cache.clear()
        if any(tensor._version != version for tensor, version in self._lent):
            raise CannotRecordError("a tensor changed after it was copied from")

    def is_arbitrary(self, place: Place) -> bool:
        """Whether nothing was ever written there: it has what memory happens to have."""
        first, *others = self._history[place.storage]
        return not others and self._calls[first].func._schema.name.startswith(
            ("aten::empty", "aten::new_empty")
        )

    def digest(self) -> str:
        """The same on workers that ran the same program with the same random numbers, on the same kind of processor."""
        text = hashlib.sha256()
        for call in self._calls:
            text.update(f"{call.func} {_constants(call.args)} {_constants(call.kwargs)}".encode())
            if call.generator is not None:
                text.update(call.generator.numpy().tobytes())
        text.update(torch.get_rng_state().numpy().tobytes())
        text.update(torch.backends.cpu.get_cpu_capability().encode())
        for tensor, _ in self._lent:
            text.update(str(tensor.double().sum().item()).encode())
        return text.hexdigest()

    def values(self, place: Place) -> torch.Tensor:
        """The values of a recorded tensor at the end of the program, in new memory."""
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            return place.within(self._replay(place.storage))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        if "device" in kwargs and kwargs["device"] is not None:
            if kwargs["device"].type not in ("cpu", "meta"):
                raise CannotRecordError(f"it builds on {kwargs['device']}")
            kwargs["device"] = torch.device("cpu")
        given: list[torch.Tensor] = []
        map_arguments((args, kwargs), given.append)
        places = {id(t): place for t in given if (place := self.place(t)) is not None}
        if given and not places:
            return func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        if places and name in _CHANGES_MEMORY:
            raise CannotRecordError(f"it calls {name} on a large tensor")
        written = _written(func, args, kwargs)
        fills = name in _FILLS and len(given) == 1 and self._covers(places[id(given[0])])
        used = {p.storage for p in places.values()}
        current = {s: self._current(s, needs_values=not fills) for s in used}
        state = None
        if torch.Tag.nondeterministic_seeded in func.tags:
            state = (kwargs.get("generator") or torch.default_generator).get_state()

        def real(tensor: torch.Tensor) -> torch.Tensor:
            place = places.get(id(tensor))
            return tensor if place is None else place.within(current[place.storage])

        result = func(*map_arguments(args, real), **map_arguments(kwargs, real))
        self._trim(but=used)
        written_places = [places[id(t)].storage for t in written if id(t) in places]
        by_address = {storage._cdata: number for number, storage in current.items()}
        made: list[tuple[int, int]] = []
        shown: Any = None
        counter = 0

        def show(tensor: torch.Tensor) -> torch.Tensor:
            """What the program gets in place of a result."""
            nonlocal shown, counter
            position, counter = counter, counter + 1
            storage = tensor.untyped_storage()
            if storage._cdata in by_address:
                number = by_address[storage._cdata]
                for own in written:
                    if id(own) in places and places[id(own)] == Place.of(tensor, number):
                        return own
                if shown is None:
                    # A view, or a change of shape in place.
                    shown = tensors_in(func(*args, **kwargs))
                return self._remember(shown[position])
            if storage.nbytes() < self._least:
                return tensor
            made.append((position, self._new(storage)))
            meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
            self._numbers[meta.untyped_storage()._cdata] = made[-1][1]
            self._seen.append(meta.untyped_storage())
            return self._remember(FakeTensor(self._fakes, meta, tensor.device))

        answer = map_arguments(result, show)
        if written_places or made:
            self._write_down(func, args, kwargs, places, made, written_places, state, fills=fills)
        return answer

    def _remember(self, tensor: torch.Tensor) -> torch.Tensor:
        self._handles.append(weakref.ref(tensor))
        return tensor

    def _covers(self, place: Place) -> bool:
        """Whether the tensor is all of its storage."""
        numel = torch.Size(place.size).numel()
        return numel * place.dtype.itemsize == self._sizes[place.storage]

    def _write_down(
        self,
        func: Any,
        args: Any,
        kwargs: Any,
        places: dict[int, Place],
        made: list[tuple[int, int]],
        written: list[int],
        state: torch.Tensor | None,
        *,
        fills: bool,
    ) -> None:
        number = len(self._calls)

        def keep(tensor: torch.Tensor) -> Any:
            place = places.get(id(tensor))
            if place is not None:
                return place
            if tensor.untyped_storage().nbytes() < self._least:
                return tensor.detach().clone()
            self._lent.append((tensor, tensor._version))
            return tensor

        reads = frozenset() if fills else frozenset(p.storage for p in places.values())
        kept = {key: None if key == "generator" else value for key, value in kwargs.items()}
        self._calls.append(
            _Call(
                func,
                map_arguments(args, keep),
                map_arguments(kept, keep),
                tuple(made),
                frozenset(written),
                reads,
                state,
            )
        )
        for _, storage in made:
            self._history[storage].append(number)
        for storage in written:
            self._history[storage].append(number)

    def _new(self, storage: torch.UntypedStorage) -> int:
        number = len(self._sizes)
        self._sizes.append(storage.nbytes())
        self._history.append([])
        self._cache[number] = storage
        self._trim(but={number})
        return number

    def _current(self, number: int, *, needs_values: bool) -> torch.UntypedStorage:
        """The storage as the program has it at this moment."""
        storage = self._cache.pop(number, None)
        if storage is None:
            if needs_values:
                with torch.random.fork_rng(devices=[]):
                    storage = self._replay(number)
            else:
                storage = torch.empty(self._sizes[number], dtype=torch.uint8).untyped_storage()
        self._cache[number] = storage
        return storage

    def _trim(self, but: set[int]) -> None:
        size = sum(self._sizes[number] for number in self._cache)
        for number in [n for n in self._cache if n not in but]:
            if size <= self._cache_bytes:
                break
            del self._cache[number]
            size -= self._sizes[number]

    def _replay(self, wanted: int) -> torch.UntypedStorage:
        """Repeat the calls that `wanted` comes from."""
        needed: set[int] = set()
        todo = [(wanted, len(self._calls))]
        while todo:
            storage, before = todo.pop()
            for number in self._that_made(storage, before):
                if number not in needed:
                    needed.add(number)
                    todo += [(s, number) for s in self._calls[number].reads]
        order = sorted(needed)
        # Where each storage is used last.
        last = {s: n for n in order for s in self._calls[n].reads | self._calls[n].writes}
        storages: dict[int, torch.UntypedStorage] = {}
        for number in order:
            call = self._calls[number]
            if call.generator is not None:
                torch.default_generator.set_state(call.generator)

            def real(place: Place) -> torch.Tensor:
                return place.within(storages[place.storage])

            result = call.func(
                *map_arguments(call.args, real, Place), **map_arguments(call.kwargs, real, Place)
            )
            results = tensors_in(result)
            for position, storage in call.makes:
                storages[storage] = results[position].untyped_storage()
            for storage in [s for s in storages if last.get(s, -1) <= number and s != wanted]:
                del storages[storage]
        return storages[wanted]

    def _that_made(self, storage: int, before: int) -> Iterator[int]:
        """The calls that gave a storage its values at the time of a call."""
        first, *others = self._history[storage]
        yield first
        for number in reversed(others):
            if number < before:
                yield number
                if storage not in self._calls[number].reads:
                    return  # a fill: what was there before does not matter


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The arguments that a function of torch writes to."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += tensors_in(value)
    return found


def _constants(value: Any) -> str:
    return str(map_arguments(value, lambda tensor: tensor.double().sum().item() if tensor.numel() else 0.0))
