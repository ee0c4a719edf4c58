"""Messages between two workers through torch.distributed."""

from __future__ import annotations

import collections
import datetime
import zlib
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.memory_map import DTYPES, describe
from paceline.comm.pending import Patience, Pending, Work
from paceline.errors import CollectiveError

MOST_CHANNELS = 1 << 16


class Wire:
    """Point-to-point messages of a group through gloo.

    Each message is two: a head of 24 bytes (channel, type, number of elements), and the tensor. Both are on
    their way at once, under tags of their own, so that a receiver who expects something else learns it from the head.
    Sending returns at once; the tensor must stay as it is until `wait()`, which returns when the receiver has it.
    """

    def __init__(self, process_group: Any, ranks: tuple[int, ...], device: torch.device, patience: Patience):
        """
        Args:
            ranks: the members' ranks in the world.
        """
        self._process_group, self._ranks, self._device, self._patience = (
            process_group,
            ranks,
            device,
            patience,
        )

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int) -> Pending:
        """Begin to send the contiguous `tensor` to rank `to` of the group."""
        other = f"rank {self._ranks[to]}"
        name = self._patience.name(f"sending {what} to {other}", tensor)
        head = _head(tensor, channel)
        with self._patience.translated(name, other):
            works = [self._send(head, to, _tag(channel)), self._send(tensor, to, _tag(channel, tensor))]
        # The head must live as long as the works that read it.
        return Work(self._patience, name, works, head.detach, other)

    def receive_(self, tensor: torch.Tensor, source: int, what: str, channel: int) -> None:
        """Fill the contiguous `tensor` with what rank `source` of the group sends next on this channel."""
        other = f"rank {self._ranks[source]}"
        name = self._patience.name(f"receiving {what} from {other}", tensor)
        head = torch.zeros(_HEAD_NUMEL, dtype=torch.int64)
        with self._patience.translated(name, other):
            announced = self._receive(head, source, _tag(channel))
            work = self._receive(tensor, source, _tag(channel, tensor))
            announced.wait()
            self._check(head, tensor, source, name)
            work.wait()

    def _send(self, tensor: torch.Tensor, to: int, tag: int) -> Any:
        return dist.isend(as_bytes(tensor), group=self._process_group, group_dst=to, tag=tag)

    def _receive(self, tensor: torch.Tensor, source: int, tag: int) -> Any:
        return dist.irecv(as_bytes(tensor), group=self._process_group, group_src=source, tag=tag)

    def _check(self, head: torch.Tensor, tensor: torch.Tensor, source: int, name: str) -> None:
        _, dtype, numel = head.tolist()
        if (DTYPES[dtype], numel) != (tensor.dtype, tensor.numel()):
            raise CollectiveError(
                self._patience.rank,
                name,
                timed_out=False,
                cause=f"rank {self._ranks[source]} sent {describe(DTYPES[dtype], numel)}, "
                f"rank {self._patience.rank} receives {describe(tensor.dtype, tensor.numel())}",
                next_step="make both workers run the same program: does it branch on the rank?",
            )


class NcclWire(Wire):
    """Point-to-point messages of a group through NCCL, which has no tags.

    The two directions of a pair are process groups of their own, so that neither waits for the other; they
    are made when the pair first talks. What arrives for another channel is kept until it is asked for.
    """

    def __init__(self, process_group: Any, ranks: tuple[int, ...], device: torch.device, patience: Patience):
        super().__init__(process_group, ranks, device, patience)
        self._own = ranks.index(patience.rank)
        self._links: dict[tuple[int, int], Any] = {}
        self._kept: dict[tuple[int, int], collections.deque[torch.Tensor]] = collections.defaultdict(
            collections.deque
        )
        """By sender and channel."""

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int) -> Pending:
        other = f"rank {self._ranks[to]}"
        name = self._patience.name(f"sending {what} to {other}", tensor)
        head = _head(tensor, channel).to(self._device)
        with self._patience.translated(name, other):
            link = self._link(self._own, to)
            place = int(self._ranks[to] > self._ranks[self._own])
            works = [dist.isend(t, group=link, group_dst=place) for t in (head, tensor)]
        return Work(self._patience, name, works, head.detach, other)

    def receive_(self, tensor: torch.Tensor, source: int, what: str, channel: int) -> None:
        other = f"rank {self._ranks[source]}"
        name = self._patience.name(f"receiving {what} from {other}", tensor)
        with self._patience.translated(name, other):
            kept = self._kept[source, channel]
            while not kept:
                self._receive_next(source)
            message = kept.popleft()
            head = _head(message, channel)
            self._check(head, tensor, source, name)
            tensor.view(-1).copy_(message)

    def _receive_next(self, source: int) -> None:
        link = self._link(source, self._own)
        place = int(self._ranks[source] > self._ranks[self._own])
        head = torch.zeros(_HEAD_NUMEL, dtype=torch.int64, device=self._device)
        dist.recv(head, group=link, group_src=place)
        channel, dtype, numel = head.tolist()
        message = torch.empty(numel, dtype=DTYPES[dtype], device=self._device)
        dist.recv(message, group=link, group_src=place)
        self._kept[source, channel].append(message)

    def _link(self, source: int, to: int) -> Any:
        """The process group of one direction. Both ends make both directions in the same order."""
        if (source, to) not in self._links:
            low, high = sorted((source, to), key=self._ranks.__getitem__)
            for direction in ((low, high), (high, low)):
                self._links[direction] = dist.new_group(
                    [self._ranks[low], self._ranks[high]],
                    timeout=datetime.timedelta(seconds=self._patience.timeout_s),
                    use_local_synchronization=True,
                )
        return self._links[source, to]


_HEAD_NUMEL = 3
_HEAD_BIT, _OWN_BIT = 1 << 29, 1 << 30
"""Tags of messages have a bit that those of swaps in collectives (`Group`) have not."""


def _head(tensor: torch.Tensor, channel: int) -> torch.Tensor:
    return torch.tensor([channel, DTYPES.index(tensor.dtype), tensor.numel()])


def _tag(channel: int, tensor: torch.Tensor | None = None) -> int:
    """Of a head, or of a message: one of another length must not be written over the end of a tensor."""
    assert 0 <= channel < MOST_CHANNELS
    if tensor is None:
        return _OWN_BIT | _HEAD_BIT | channel
    kind = zlib.crc32(f"{tensor.dtype} {tensor.numel()}".encode())
    return _OWN_BIT | channel << 13 | kind & 0x1FFF


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous `tensor`, 1-D: gloo does not know all types."""
    return tensor.detach().view(-1).view(torch.uint8)
