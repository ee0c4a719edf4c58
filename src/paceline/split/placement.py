"""How a tensor lies on the workers of a tensor-parallel group."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Shard:
    """Dimension `dim` is divided: each of its `parts`, end to end, is cut into equal, contiguous pieces.

    Worker r holds piece r of every part, end to end. Most tensors have one part; the fused weight of
    queries, keys and values has three, so that each worker holds whole heads of each of them. A tensor
    without a `Shard` is whole on every worker.
    """

    dim: int
    """Not negative."""
    parts: tuple[int, ...]
    """Sizes that add up to the whole dimension, each divisible by the number of workers."""

    @property
    def size(self) -> int:
        """Of the whole dimension."""
        return sum(self.parts)

    def at(self, dim: int) -> Shard:
        """The same along another dimension."""
        return dataclasses.replace(self, dim=dim)


def evenly(dim: int, size: int, groups: int = 1) -> Shard:
    """Dimension `dim`, of `size`, in `groups` equal parts."""
    return Shard(dim, (size // groups,) * groups)


def is_divisible(shard: Shard, num_workers: int) -> bool:
    return all(part and part % num_workers == 0 for part in shard.parts)


def whole_shape(local: Sequence[int], shard: Shard | None) -> Shape:
    """The shape of the whole tensor, from that of a piece."""
    if shard is None:
        return tuple(local)
    return (*local[: shard.dim], shard.size, *local[shard.dim + 1 :])


def local_shape(whole: Sequence[int], shard: Shard | None, num_workers: int) -> Shape:
    """The shape of a piece, from that of the whole tensor."""
    if shard is None:
        return tuple(whole)
    return (*whole[: shard.dim], shard.size // num_workers, *whole[shard.dim + 1 :])


def take(whole: torch.Tensor, shard: Shard, rank: int, num_workers: int) -> torch.Tensor:
    """Worker `rank`'s piece. A view where there is one part, a copy otherwise."""
    pieces, begin = [], 0
    for part in shard.parts:
        length = part // num_workers
        pieces.append(whole.narrow(shard.dim, begin + rank * length, length))
        begin += part
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, shard.dim)


def join(pieces: Sequence[torch.Tensor], shard: Shard) -> torch.Tensor:
    """The whole tensor, from the pieces in the order of rank."""
    if len(shard.parts) == 1:
        return torch.cat(list(pieces), shard.dim)
    num_workers = len(pieces)
    lengths = [part // num_workers for part in shard.parts]
    by_worker = [piece.split(lengths, shard.dim) for piece in pieces]
    return torch.cat([cut[number] for number in range(len(lengths)) for cut in by_worker], shard.dim)


def follow_view(shard: Shard, before: Shape, after: Shape, num_workers: int) -> Shard | None:
    """Where the pieces lie after a view from shape `before` to shape `after`; None: not along one dimension.

    In the order of memory, the divided dimension is `a` rows (the dimensions before it, and its parts) of
    periods of `period` elements, each cut into `num_workers` contiguous pieces. A dimension of the result that
    is made of whole periods, in units that do not cut a piece, carries the division on.
    """
    if len(set(shard.parts)) > 1 or math.prod(before) == 0:
        return None
    inner = math.prod(before[shard.dim + 1 :])
    period = shard.parts[0] * inner
    for dim, size in enumerate(after):
        unit = math.prod(after[dim + 1 :])
        if period % unit:
            continue
        length = period // unit
        if length % num_workers == 0 and size % length == 0:
            return Shard(dim, (length,) * (size // length))
    return None


def regroup(shard: Shard, before: Shape, after: Shape, num_workers: int) -> Shard | None:
    """The division of the same dimension into more parts that a view to `after` would carry on; None: there is none."""
    for groups in range(2, min(shard.size, 64) + 1):
        if shard.size % groups == 0:
            other = evenly(shard.dim, shard.size, groups)
            if is_divisible(other, num_workers) and follow_view(other, before, after, num_workers):
                return other
    return None
