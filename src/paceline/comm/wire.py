"""Messages between two workers through torch.distributed."""

from __future__ import annotations

import collections
import dataclasses
import datetime
import zlib
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from paceline.comm.memory_map import DTYPES, describe
from paceline.comm.pending import Patience, Pending, Work
from paceline.errors import CollectiveError

MOST_CHANNELS = 1 << 16
_MOST_AHEAD = 16
"""Messages of a channel that are awaited before anyone has asked for them."""


_Kind = tuple[torch.dtype, int]
"""Type and number of elements of a message."""


@dataclasses.dataclass
class _Posted:
    """A receive that has begun."""

    into: torch.Tensor
    work: Any


class _Ahead:
    """What is received from one worker on one channel, and what is likely to come next.

    gloo carries nothing before its receiver has said that it waits: a message that is not awaited until it is needed
    comes a round trip and its own length later. Where the receiver is sending at the time, that word itself waits until
    what it sends has gone. So after each message the next ones are awaited already. Messages of one channel follow each
    other in the same order step after step: after one of a kind comes what came after the last of that kind. A guess
    that was wrong stays for the next message of its kind.
    """

    def __init__(self) -> None:
        self.heads: collections.deque[_Posted] = collections.deque()
        self.bodies: dict[_Kind, collections.deque[_Posted]] = collections.defaultdict(collections.deque)
        self._free: dict[_Kind, list[torch.Tensor]] = collections.defaultdict(list)
        self._next: dict[_Kind, _Kind] = {}
        self._last: _Kind | None = None

    def after(self, kind: _Kind, rounds: int) -> collections.Counter[_Kind]:
        """How many of which kinds are likely to come after the message of `kind` which has just come.

        Args:
            rounds: so many are looked ahead as far as it is known what follows what, each up to the next message of
                `kind`; 0: the next message alone.
        """
        if self._last is not None:
            self._next[self._last] = kind
        self._last = kind
        likely = [self._next.get(kind, kind)]
        while likely.count(kind) < rounds and likely[-1] in self._next and len(likely) < _MOST_AHEAD:
            likely.append(self._next[likely[-1]])
        return collections.Counter(likely)

    def room(self, kind: _Kind) -> torch.Tensor:
        """Where a message is received before anyone has asked for it."""
        free = self._free[kind]
        return free.pop() if free else torch.empty(kind[1], dtype=kind[0])

    def give_back(self, room: torch.Tensor) -> None:
        self._free[room.dtype, room.numel()].append(room)

    def forget_rooms(self) -> None:
        self._free.clear()


class Wire:
    """Point-to-point messages of a group through gloo.

    Each message is two: a head of 24 bytes (channel, type, number of elements), and the tensor. Both are on
    their way at once, under tags of their own, so that a receiver who expects something else learns it from the head.
    Sending returns at once; the tensor must stay as it is until `wait()`, which returns when the receiver has it, or
    has room for it. A channel takes the memory of the messages that are awaited ahead, beside what it carries.
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
        self._ahead: dict[tuple[int, int], _Ahead] = collections.defaultdict(_Ahead)
        """By sender and channel."""
        self._tags: dict[tuple[bool, int, int], dict[_Kind, int]] = collections.defaultdict(dict)

    def forget_rooms(self) -> None:
        """Give back what is kept to receive into, and is not awaited yet."""
        for ahead in self._ahead.values():
            ahead.forget_rooms()

    def close(self) -> None:
        """Give back what it holds; nothing is on its way any more."""

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int) -> Pending:
        """Begin to send the contiguous `tensor` to rank `to` of the group."""
        other = f"rank {self._ranks[to]}"
        name = self._patience.name(f"sending {what} to {other}", tensor)
        head = _head(tensor, channel)
        with self._patience.translated(name, other):
            tag = self._tag_of(True, to, channel, (tensor.dtype, tensor.numel()))
            works = [self._send(head, to, _head_tag(channel)), self._send(tensor, to, tag)]
        # The head must live as long as the works that read it.
        return Work(self._patience, name, works, head.detach, other)

    def receive_(
        self, tensor: torch.Tensor, source: int, what: str, channel: int, rounds_ahead: int = 0
    ) -> None:
        """Fill the contiguous `tensor` with what rank `source` of the group sends next on this channel.

        Args:
            rounds_ahead: as of `Group.receive_`.
        """
        other = f"rank {self._ranks[source]}"
        name = self._patience.name(f"receiving {what} from {other}", tensor)
        kind = (tensor.dtype, tensor.numel())
        ahead = self._ahead[source, channel]
        with self._patience.translated(name, other):
            head = ahead.heads.popleft() if ahead.heads else self._post_head(source, channel)
            bodies = ahead.bodies[kind]
            body = bodies.popleft() if bodies else self._post(source, channel, tensor)
            head.work.wait()
            self._check(head.into, tensor, source, name)
            body.work.wait()
            likely = ahead.after(kind, rounds_ahead)
            while len(ahead.heads) < likely.total():
                ahead.heads.append(self._post_head(source, channel))
            for other_kind, number in likely.items():
                awaited = ahead.bodies[other_kind]
                while len(awaited) < number:
                    awaited.append(self._post(source, channel, ahead.room(other_kind)))
        if body.into is not tensor:
            tensor.view(-1).copy_(body.into)
            ahead.give_back(body.into)

    def _post_head(self, source: int, channel: int) -> _Posted:
        head = torch.zeros(_HEAD_NUMEL, dtype=torch.int64)
        return _Posted(head, self._receive(head, source, _head_tag(channel)))

    def _post(self, source: int, channel: int, into: torch.Tensor) -> _Posted:
        tag = self._tag_of(False, source, channel, (into.dtype, into.numel()))
        return _Posted(into, self._receive(into, source, tag))

    def _tag_of(self, sends: bool, other: int, channel: int, kind: _Kind) -> int:
        """Of a message: one of another length must not be written over the end of a tensor.

        No two kinds of a channel have the same; both ends have seen its kinds come in the same order.
        """
        tags = self._tags[sends, other, channel]
        salt = 0
        while kind not in tags:
            tag = _tag(channel, f"{kind[0]} {kind[1]}{salt or ''}")
            if tag not in tags.values():
                tags[kind] = tag
            salt += 1
        return tags[kind]

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


def nccl_link(name: str, rank: int, timeout_s: float) -> Any:
    """A process group of two workers, which only they make; `rank` is 0 or 1, and both give the same `name`.

    `new_group(use_local_synchronization=True)` would name it by how many groups a process has made before, of which
    two workers may think differently: they would wait for each other for ever.
    """
    store = PrefixStore(f"paceline/link/{name}", dist.distributed_c10d._get_default_store())
    options = dist.ProcessGroupNCCL.Options()
    options._timeout = datetime.timedelta(seconds=timeout_s)
    return dist.ProcessGroupNCCL(store, rank, 2, options)


class NcclWire(Wire):
    """Point-to-point messages of a group through NCCL, which has no tags.

    The two directions of a pair are process groups of their own, so that neither waits for the other. What arrives for
    another channel is kept until it is asked for.

    A link's first message blocks both ends until they meet. `open_ring` makes neighbours meet before there is
    something to wait for; others meet when they first talk.
    """

    def __init__(
        self,
        process_group: Any,
        ranks: tuple[int, ...],
        device: torch.device,
        patience: Patience,
        name: str,
    ):
        """
        Args:
            name: the same on all workers of the group, and no other wire's before or after: a name that was used tells
                an end where the other one was then.
        """
        super().__init__(process_group, ranks, device, patience)
        self._own = ranks.index(patience.rank)
        self._name = name
        self._links: dict[tuple[int, int], Any] = {}
        self._kept: dict[tuple[int, int], collections.deque[torch.Tensor]] = collections.defaultdict(
            collections.deque
        )
        """By sender and channel."""

    def open_ring(self) -> None:
        """Have each worker meet the next one, and the last the first, in an order that leaves nobody waiting.

        All workers of the group call it.
        """
        size = len(self._ranks)
        pairs = sorted({tuple(sorted((place, (place + 1) % size))) for place in range(size)})
        for low, high in pairs:
            if self._own not in (low, high):
                continue
            for source, to in ((low, high), (high, low)):
                name = f"opening the link from rank {self._ranks[source]} to rank {self._ranks[to]}"
                hello = torch.zeros(1, device=self._device)
                other = f"rank {self._ranks[low + high - self._own]}"
                with self._patience.translated(self._patience.name(name, hello), other):
                    link = self._link(source, to)
                    if source == self._own:
                        link.send([hello], 1, 0).wait()
                    else:
                        link.recv([hello], 0, 0).wait()

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int) -> Pending:
        other = f"rank {self._ranks[to]}"
        name = self._patience.name(f"sending {what} to {other}", tensor)
        head = _head(tensor, channel).to(self._device)
        with self._patience.translated(name, other):
            link = self._link(self._own, to)
            works = [link.send([t], 1, 0) for t in (head, tensor)]
        return Work(self._patience, name, works, head.detach, other)

    def receive_(
        self, tensor: torch.Tensor, source: int, what: str, channel: int, rounds_ahead: int = 0
    ) -> None:
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

    def close(self) -> None:
        for link in self._links.values():
            link.shutdown()
        self._links.clear()

    def _receive_next(self, source: int) -> None:
        link = self._link(source, self._own)
        head = torch.zeros(_HEAD_NUMEL, dtype=torch.int64, device=self._device)
        link.recv([head], 0, 0).wait()
        channel, dtype, numel = head.tolist()
        message = torch.empty(numel, dtype=DTYPES[dtype], device=self._device)
        link.recv([message], 0, 0).wait()
        self._kept[source, channel].append(message)

    def _link(self, source: int, to: int) -> Any:
        """The process group of one direction, in which `source` is rank 0."""
        if (source, to) not in self._links:
            name = f"{self._name}/{source}-{to}"
            self._links[source, to] = nccl_link(name, int(to == self._own), self._patience.timeout_s)
        return self._links[source, to]


_HEAD_NUMEL = 3
_HEAD_BIT, _OWN_BIT = 1 << 29, 1 << 30
"""Tags of messages have a bit that those of swaps in collectives (`Group`) have not."""


def _head(tensor: torch.Tensor, channel: int) -> torch.Tensor:
    return torch.tensor([channel, DTYPES.index(tensor.dtype), tensor.numel()])


def _head_tag(channel: int) -> int:
    assert 0 <= channel < MOST_CHANNELS
    return _OWN_BIT | _HEAD_BIT | channel


def _tag(channel: int, text: str) -> int:
    assert 0 <= channel < MOST_CHANNELS
    return _OWN_BIT | channel << 13 | zlib.crc32(text.encode()) & 0x1FFF


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous `tensor`, 1-D: gloo does not know all types."""
    return tensor.detach().view(-1).view(torch.uint8)
