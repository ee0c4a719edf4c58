"""Where shared parameters lie in memory, and which worker of a host has which share of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping

import torch
from torch import nn

_ALIGNED_BYTES = 64
"""Each parameter, and each worker's share, begins in a cache line of its own."""


@dataclasses.dataclass(eq=False)
class Member:
    """One parameter."""

    name: str
    parameter: nn.Parameter
    begin: int
    """In its flat, in numbers; `end` likewise."""
    end: int
    segment: Segment
    own_gradient: torch.Tensor | None = None
    """This worker's own, in shared memory, of the parameter's shape."""
    was_taken: bool = False
    """A gradient of this step is in `own_gradient`."""
    piece: nn.Parameter | None = None
    """What of it lies in this worker's share: 1-D, or whole and of its shape."""
    piece_gradient: torch.Tensor | None = None


@dataclasses.dataclass(eq=False)
class Segment:
    """Parameters end to end. Every worker of a host has a share of each segment: a range of it, which may be empty."""

    members: list[Member] = dataclasses.field(default_factory=list)
    bounds: list[int] = dataclasses.field(default_factory=list)
    """Worker r's share lies from `bounds[r]` to `bounds[r + 1]`, in numbers of the flat."""

    def share(self, place: int) -> slice:
        return slice(self.bounds[place], self.bounds[place + 1])

    def overlap(self, member: Member, place: int) -> tuple[int, int]:
        """What of a parameter lies in a worker's share, in numbers of the flat: from, and up to."""
        begin, end = self.bounds[place], self.bounds[place + 1]
        return max(member.begin, begin), min(member.end, end)


class Flat:
    """Parameters of one type of number, trained or not, end to end: segment after segment.

    Those that are sent together are one segment. Where gradients travel during the backward pass there are many, in the
    order in which it finishes them, the last parameters first: so each worker has a share of what is there early, and
    of what comes at the end. Elsewhere there is one.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        size: int,
        *,
        by_numbers: bool,
        segment_bytes: int | None = None,
        late: Collection[nn.Parameter] = (),
    ) -> None:
        """
        Args:
            size: how many workers a host has.
            by_numbers: shares are ranges of numbers; else whole parameters.
            segment_bytes: of a segment at most, but for a parameter that is larger; None: all in one.
            late: parameters whose gradients are not there before the end.
        """
        first = next(iter(named.values()))
        self.dtype, self.trains = first.dtype, first.requires_grad
        self._unit = _ALIGNED_BYTES // self.dtype.itemsize
        self.members: list[Member] = []
        self.segments: list[Segment] = []
        self.numel = 0
        owner = None if by_numbers else _by_load(named, size)
        for together in _cut(named, segment_bytes, late):
            self._append(together, size, owner)
        self.gradients: list[torch.Tensor] = []
        """Of each worker, 1-D; empty where nothing is trained."""

    @property
    def num_bytes(self) -> int:
        return self.numel * self.dtype.itemsize

    def _append(self, named: Mapping[str, nn.Parameter], size: int, owner: Mapping[str, int] | None) -> None:
        segment, begin = Segment(), self.numel
        ends = []
        for rank in range(size if owner is not None else 1):
            for name, parameter in named.items():
                if owner is not None and owner[name] != rank:
                    continue
                at = self.numel
                member = Member(name, parameter, at, at + parameter.numel(), segment)
                segment.members.append(member)
                self.numel = self._up(member.end)
            ends.append(self.numel)
        if owner is None:
            width = self._up(-(-(self.numel - begin) // size))
            ends = [min(self.numel, begin + width * (rank + 1)) for rank in range(size)]
        segment.bounds = [begin, *ends]
        self.segments.append(segment)
        self.members += segment.members

    def _up(self, numel: int) -> int:
        return -(-numel // self._unit) * self._unit


def _cut(
    named: Mapping[str, nn.Parameter], segment_bytes: int | None, late: Collection[nn.Parameter]
) -> list[dict[str, nn.Parameter]]:
    """Which parameters make a segment, in their order; `late` ones are in the last."""
    if segment_bytes is None:
        return [dict(named)]
    found: list[dict[str, nn.Parameter]] = []
    at_the_end = {name: parameter for name, parameter in named.items() if parameter in late}
    room = 0
    for name, parameter in reversed(list(named.items())):
        if name in at_the_end:
            continue
        num_bytes = parameter.numel() * parameter.element_size()
        if not found or num_bytes > room:
            found.append({})
            room = segment_bytes
        found[-1][name] = parameter
        room -= num_bytes
    return [*found, at_the_end] if at_the_end else found


def _by_load(named: Mapping[str, nn.Parameter], size: int) -> dict[str, int]:
    """Whole parameters shared out among `size` workers: the largest first, each to who has least so far."""
    loads = [0] * size
    owner: dict[str, int] = {}
    for name, parameter in sorted(named.items(), key=lambda item: -item[1].numel()):
        least = loads.index(min(loads))
        owner[name] = least
        loads[least] += parameter.numel()
    return owner
