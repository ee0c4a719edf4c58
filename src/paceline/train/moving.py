"""Parameters, and what is shaped like them, that workers hold in pieces: made whole on rank 0, and handed out again.

One tensor after the other, each piece once and by a message from one worker to another. Layouts are not known here:
a worker says what its pieces are.
"""

from __future__ import annotations

import base64
import dataclasses
import math
import pickle
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.comm.group import Group
from paceline.comm.wire import as_bytes
from paceline.split.placement import Shard, join, local_shape, take


@dataclasses.dataclass(frozen=True, eq=False)
class Piece:
    """What one worker has of a parameter: numbers `begin … end-1` of what tensor parallelism leaves it."""

    name: str
    tensor: torch.Tensor
    """1-D, or of the shape that tensor parallelism leaves."""
    shape: tuple[int, ...]
    """Of the whole."""
    shard: Shard | None = None
    """How tensor parallelism divides it."""
    place: int = 0
    """This worker's in its tensor-parallel group, where that divides it; likewise below."""
    num_places: int = 1
    begin: int = 0
    end: int = -1
    """-1: to the end."""

    @property
    def is_whole(self) -> bool:
        return self.shard is None and tuple(self.tensor.shape) == self.shape

    def where(self) -> Where:
        """The same without its values."""
        local = math.prod(local_shape(self.shape, self.shard, self.num_places))
        end = local if self.end < 0 else self.end
        place = (self.place, self.num_places) if self.shard is not None else (0, 1)
        return Where(self.shape, self.tensor.dtype, self.shard, *place, self.begin, end)


@dataclasses.dataclass(frozen=True)
class Where:
    """Which part of a parameter a piece is."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    shard: Shard | None
    place: int
    num_places: int
    begin: int
    end: int

    @property
    def local_shape(self) -> tuple[int, ...]:
        return local_shape(self.shape, self.shard, self.num_places)

    def cut(self, whole: torch.Tensor) -> torch.Tensor:
        """This part of it, 1-D."""
        local = whole if self.shard is None else take(whole, self.shard, self.place, self.num_places)
        return local.reshape(-1)[self.begin : self.end]


class Pieces:
    """The pieces of all workers of a group; each has its own, and knows where the others are."""

    def __init__(self, group: Group, own: Sequence[Piece]) -> None:
        """A collective call, as all of this class."""
        self._group = group
        self.own = {piece.name: piece for piece in own}
        told = gather_objects(group, {piece.name: piece.where() for piece in own}, "pieces of parameters")
        self._held: dict[str, dict[int, Where]] = {}
        """By name and rank."""
        for rank, wheres in enumerate(told):
            for name, where in wheres.items():
                self._held.setdefault(name, {})[rank] = where

    @property
    def names(self) -> list[str]:
        """Of all parameters that some worker has a piece of, in the same order everywhere."""
        return list(self._held)

    def first_holder(self, name: str) -> int:
        return min(self._held[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the whole parameter."""
        return self._held[name][self.first_holder(name)].shape

    def dtype(self, name: str) -> torch.dtype:
        """Of the parameter."""
        return self._held[name][self.first_holder(name)].dtype

    def collect(
        self, name: str, of: Callable[[Piece], torch.Tensor], dtype: torch.dtype
    ) -> torch.Tensor | None:
        """On rank 0 a new tensor on the CPU, whole; on others None.

        Args:
            of: what to take of a piece: as long as it, and of type `dtype`.
        """
        firsts: dict[Where, int] = {}
        for rank, where in self._held[name].items():
            firsts.setdefault(where, rank)
        own = self._held[name].get(self._group.rank)
        if self._group.rank != 0:
            if own is not None and firsts[own] == self._group.rank:
                self._send(of(self.own[name]).detach().contiguous(), 0, name)
            return None
        places: dict[int, torch.Tensor] = {}
        for where, rank in firsts.items():
            numel = math.prod(where.local_shape)
            local = places.setdefault(where.place, torch.zeros(numel, dtype=dtype))
            if rank == 0:
                part = of(self.own[name]).detach().reshape(-1)
            else:
                part = self._receive(where.end - where.begin, dtype, rank, name)
            local[where.begin : where.end].copy_(part)
        shaped = [places[place].view(where.local_shape) for place in sorted(places)]
        return shaped[0] if where.shard is None else join(shaped, where.shard)

    def hand_out(
        self, name: str, whole: torch.Tensor | None, into: torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """Fill `into`, as long as this worker's piece, from what is `whole` on rank 0; None on a worker without."""
        held, rank = self._held[name], self._group.rank
        if len(held) == self._group.size > 1 and len(set(held.values())) == 1:
            where = held[rank]
            part = torch.empty(where.end - where.begin, dtype=dtype, device=self._group.device)
            if whole is not None:
                part.copy_(where.cut(whole))
            if part.numel():
                self._group.broadcast_(as_bytes(part), name)
            assert into is not None
            into.copy_(part.view(into.shape))
            return
        if whole is not None:
            for to, where in held.items():
                part = where.cut(whole)
                if to == rank:
                    assert into is not None
                    into.copy_(part.view(into.shape))
                else:
                    self._send(part.to(self._group.device).contiguous(), to, name)
        elif into is not None:
            into.copy_(self._receive(into.numel(), dtype, 0, name).view(into.shape))

    def _send(self, tensor: torch.Tensor, to: int, name: str) -> None:
        if tensor.numel():
            self._group.start_send(as_bytes(tensor), to, name).wait()

    def _receive(self, numel: int, dtype: torch.dtype, source: int, name: str) -> torch.Tensor:
        part = torch.empty(numel, dtype=dtype, device=self._group.device)
        if numel:
            self._group.receive_(as_bytes(part), source, name)
        return part


def gather_objects(group: Group, value: Any, what: str) -> list[Any]:
    """Every worker's `value`, in the order of rank: as `gather_json`, of anything that can be pickled."""
    text = base64.b64encode(pickle.dumps(value)).decode()
    return [pickle.loads(base64.b64decode(told)) for told in group.gather_json(text, what)]
