"""What workers with the same place on several hosts exchange: messages through gloo, among them sums under way."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.pending import Patience
from paceline.comm.wire import as_bytes


@dataclasses.dataclass(frozen=True)
class HostGrid:
    """A group as `num_hosts` rows, its hosts, of `per_host` neighbours each; and one member's place in it."""

    ranks: tuple[int, ...]
    """The members' ranks in the world, host after host."""
    rank: int
    """This worker's place in `ranks`."""
    per_host: int

    @property
    def num_hosts(self) -> int:
        return len(self.ranks) // self.per_host

    @property
    def host(self) -> int:
        """The number of this worker's host."""
        return self.rank // self.per_host

    @property
    def place(self) -> int:
        """This worker's number on its host."""
        return self.rank % self.per_host

    @property
    def row(self) -> slice:
        """The members on this worker's host."""
        return slice(self.host * self.per_host, (self.host + 1) * self.per_host)

    @property
    def others(self) -> list[int]:
        """The numbers of the other hosts."""
        return [host for host in range(self.num_hosts) if host != self.host]

    def peer(self, host: int) -> int:
        """The member on `host` that has the same place there."""
        return host * self.per_host + self.place


@dataclasses.dataclass(frozen=True, eq=False)
class _Summing:
    """A sum under way."""

    name: str
    number: int
    own: torch.Tensor
    mine: torch.Tensor
    """What of it this worker adds up."""
    received: dict[int, torch.Tensor]
    works: list[tuple[str, Any]]


class Network:
    """One worker's exchanges with those that have its place on the other hosts, its peers."""

    def __init__(self, grid: HostGrid, process_group: Any, patience: Patience) -> None:
        self._grid, self._process_group, self._patience = grid, process_group, patience
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
        self._rooms: dict[tuple[torch.dtype, int], list[dict[int, torch.Tensor]]] = {}
        """Free ones, of sums that are begun before they are waited for."""
        self._under_way: list[_Summing] = []
        self.sent_bytes = 0

    def sum_(self, own: torch.Tensor, name: str) -> None:
        """Replace `own` (1-D) by its sum over the peers: of more than two each adds up a part."""
        grid = self._grid
        if grid.num_hosts == 2:
            self.swap_and_add({grid.others[0]: own}, own, name)
            return
        parts = own.tensor_split(grid.num_hosts)
        mine = parts[grid.host]
        self.swap_and_add({host: parts[host] for host in grid.others}, mine, name)
        self.exchange(dict.fromkeys(grid.others, mine), {host: parts[host] for host in grid.others}, name)

    def start_sum(self, own: torch.Tensor, name: str, number: int) -> None:
        """Begin `sum_`; `own` is left alone until `finish_sums`.

        Nothing has to be begun in the same order on all hosts. Of more than two hosts the first half of the bytes is on
        its way now, the other one, which hands on what was added up, from `finish_sums` on: gloo does not tell what has
        come without waiting for it.

        Args:
            number: from 0; of sums under way together each has its own, the same on all hosts.
        """
        grid = self._grid
        if grid.num_hosts == 2:
            mine, outgoing = own, {grid.others[0]: own}
        else:
            parts = own.tensor_split(grid.num_hosts)
            mine, outgoing = parts[grid.host], {host: parts[host] for host in grid.others}
        free = self._rooms.setdefault((own.dtype, mine.numel()), [])
        received = free.pop() if free else {host: torch.empty_like(mine) for host in grid.others}
        works = self._post(outgoing, received, name, 2 * number)
        self._under_way.append(_Summing(name, number, own, mine, received, works))

    def finish_sums(self) -> None:
        """Complete all that were begun."""
        grid = self._grid
        sums, self._under_way = self._under_way, []
        handed_on: list[tuple[str, list[tuple[str, Any]]]] = []
        for one in sums:
            self._wait(one.works, one.name)
            self._add(one.mine, one.received)
            self._rooms[one.mine.dtype, one.mine.numel()].append(one.received)
            if grid.num_hosts > 2:
                parts = one.own.tensor_split(grid.num_hosts)
                outgoing = dict.fromkeys(grid.others, one.mine)
                incoming = {host: parts[host] for host in grid.others}
                handed_on.append((one.name, self._post(outgoing, incoming, one.name, 2 * one.number + 1)))
        for name, works in handed_on:
            self._wait(works, name)

    def swap_and_add(self, outgoing: Mapping[int, torch.Tensor], own: torch.Tensor, name: str) -> None:
        """Send each host what is meant for it, and add what they send to `own`, in the order of hosts."""
        received = self._room(own)
        self.exchange(outgoing, received, name)
        self._add(own, received)

    def _add(self, own: torch.Tensor, received: Mapping[int, torch.Tensor]) -> None:
        total, *others = [received.get(host, own) for host in range(self._grid.num_hosts)]
        for other in others:
            total.add_(other)
        if total is not own:
            own.copy_(total)

    def broadcast_(self, own: torch.Tensor, source: int, name: str) -> None:
        """Replace `own` (1-D) by that of the peer on host `source`.

        Of more than two the source gives each other one a part, and they pass these on: else it would send
        all of it to each of them.
        """
        grid = self._grid
        is_source = grid.host == source
        receivers = [host for host in grid.others if host != source]
        if grid.num_hosts == 2:
            self.exchange(
                dict.fromkeys(receivers, own) if is_source else {}, {} if is_source else {source: own}, name
            )
            return
        parts = own.tensor_split(grid.num_hosts)
        mine = parts[grid.host]
        if is_source:
            self.exchange({host: parts[host] for host in receivers}, {}, name)
            self.exchange(dict.fromkeys(receivers, mine), {}, name)
        else:
            self.exchange({}, {source: mine}, name)
            incoming = {host: parts[host] for host in grid.others}
            self.exchange(dict.fromkeys(receivers, mine), incoming, name)

    def exchange(
        self, outgoing: Mapping[int, torch.Tensor], incoming: Mapping[int, torch.Tensor], name: str
    ) -> None:
        """Send contiguous tensors to peers, fill others with what they send, by host; return when all is done."""
        self._wait(self._post(outgoing, incoming, name), name)

    def _post(
        self,
        outgoing: Mapping[int, torch.Tensor],
        incoming: Mapping[int, torch.Tensor],
        name: str,
        number: int | None = None,
    ) -> list[tuple[str, Any]]:
        """Begin to send and to receive; the works, each with who is waited for.

        Args:
            number: of the exchange, where it may overtake others.
        """
        works: list[tuple[str, Any]] = []
        for call, way, messages in ((dist.irecv, "group_src", incoming), (dist.isend, "group_dst", outgoing)):
            for host, tensor in messages.items():
                if tensor.numel() == 0:
                    continue
                peer = self._grid.peer(host)
                other = f"rank {self._grid.ranks[peer]}"
                with self._patience.translated(name, other):
                    work: Any = call(
                        as_bytes(tensor), group=self._process_group, tag=_tag(tensor, number), **{way: peer}
                    )
                works.append((other, work))
        self.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in outgoing.values())
        return works

    def forget_rooms(self) -> None:
        """Give back what is kept to receive into."""
        self._scratch.clear()
        for free in self._rooms.values():
            free.clear()

    def _wait(self, works: Sequence[tuple[str, Any]], name: str) -> None:
        for other, work in works:
            with self._patience.translated(name, other):
                work.wait()

    def _room(self, like: torch.Tensor) -> dict[int, torch.Tensor]:
        """Room for a tensor from each other host. Kept: fresh memory costs a page fault every 4 KiB."""
        num_needed = like.numel() * len(self._grid.others)
        if like.dtype not in self._scratch or self._scratch[like.dtype].numel() < num_needed:
            self._scratch[like.dtype] = torch.empty(num_needed, dtype=like.dtype)
        rows = self._scratch[like.dtype][:num_needed].view(len(self._grid.others), like.numel())
        return dict(zip(self._grid.others, rows.unbind(0), strict=True))


_NUMBERED = 1 << 28
_MOST_NUMBERS = 1 << 20


def _tag(tensor: torch.Tensor, number: int | None) -> int:
    """One for each type and length: what has another length must not be written over the end of a tensor.

    Messages without a number come in the order in which they were sent. Below 2^29, so that none of `Wire`'s is equal.
    """
    kind = zlib.crc32(f"{tensor.dtype} {tensor.numel()}".encode())
    if number is None:
        return kind & (_NUMBERED - 1)
    assert number < _MOST_NUMBERS
    return _NUMBERED | number << 8 | kind & 0xFF
