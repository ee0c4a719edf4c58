"""Collectives among workers on several hosts: through memory within each host, through gloo between hosts.

A network is slower than memory by an order of magnitude, and the workers of a host share its one cable. So
what they can do among themselves they do in memory, and each carries a part of what is left over the network.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.memory_map import MemoryMap, join_memory
from paceline.comm.pending import Patience
from paceline.comm.shared_memory import SharedMemory
from paceline.comm.wire import as_bytes
from paceline.errors import CollectiveError

_WHOLE_BYTES = 4096
"""Up to this size one worker of a host carries the whole: a message costs more than what it carries."""


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


def arrange(ranks: tuple[int, ...], rank: int, hosts: Sequence[int]) -> tuple[HostGrid | None, str]:
    """The grid of a group whose members are on `hosts` (a number for each, ascending), or why there is none.

    There must be several members on each host, and equally many.
    """
    per_host = set(collections.Counter(hosts).values())
    if per_host == {1}:
        return None, "they are on several hosts"
    if len(per_host) > 1:
        return None, "they are on several hosts, more of them on some than on others"
    return HostGrid(ranks, rank, per_host.pop()), ""


def join_host_memory(
    grid: HostGrid,
    local_size: int,
    makers: Sequence[int],
    data_bytes: int,
    gather_json: Callable[[Any, str], list[Any]],
) -> tuple[MemoryMap | None, str]:
    """Map memory among the members of each host: on all hosts, or on none. A collective call of the group.

    Args:
        local_size: how many workers are on this host, in the group or not.
        makers: the places on a host of those that make a stretch of `data_bytes`.
        gather_json: gives every member's value, in the order of the group: `(value, what it is)`.

    Returns:
        The memory of this worker's host, or None and the first reason why a host has none.
    """

    def tell_host(value: Any, what: str) -> list[Any]:
        return [told["value"] for told in gather_json({"value": value}, what)[grid.row]]

    memory, reason = join_memory(grid.place, grid.per_host, local_size, makers, data_bytes, tell_host)
    # A host that cannot has told less than the others: it listens until they are done as well.
    while True:
        told = gather_json({"reason": reason}, "whether memory is shared on every host")
        if all("reason" in row for row in told):
            break
    reasons = [row["reason"] for row in told]
    reason = next(
        (f"on host {at // grid.per_host}: {reason}" for at, reason in enumerate(reasons) if reason), ""
    )
    if reason and memory is not None:
        memory.close()
        memory = None
    return memory, reason


class Hierarchy:
    """The collectives of `SharedMemory`, for a group of h hosts with k ≥ 2 workers on each.

    Bytes that one worker sends over the network, for a tensor of b bytes (`network_bytes` counts them; TCP
    adds some percent). A host sends k times as much, and every byte reaches a host once:

        all-reduce, two hosts      b/k
        all-reduce, more           2 (h-1)/h · b/k
        all-gather that gives b    (h-1)/h · b/k
        reduce-scatter of b        (h-1)/h · b/k
        broadcast, two hosts       b/k on the source's host, nothing on the other
        broadcast, more            2 (h-1)/h · b/k on the source's host, (h-2)/h · b/k on the others

    Up to 4 KiB the last worker of each host carries the whole of an all-reduce or a broadcast (k = 1 in its
    lines), and the others nothing. In memory: an all-reduce is a reduce-scatter and an all-gather of
    `SharedMemory`; an all-gather and a reduce-scatter are h of them, of b/h each.

    A sum is taken within each host in the order of rank, and these sums are added in the order of hosts. Each
    of its elements is added up by one worker of a host (by one worker alone, with more than two hosts), so
    that all get identical bits.

    A worker that dies is noticed within a second by those of its host that wait for it in memory, and by the
    breaking connection where it is waited for over the network; a silent one by the time-out, of those too
    that wait for somebody who waits for it. After an operation has failed all later ones fail.
    """

    def __init__(self, memory: SharedMemory, grid: HostGrid, process_group: Any, timeout_s: float) -> None:
        """
        Args:
            memory: that of the members on this host, in their order.
            process_group: torch.distributed's (gloo), of all members.
        """
        self._memory, self._grid = memory, grid
        self._patience = Patience(grid.ranks[grid.rank], timeout_s)
        self._network = _Network(grid, process_group, self._patience)
        self._failure = ""

    def sum_between_hosts_(self, own: torch.Tensor, what: str) -> None:
        """Replace `own` (1-D) by its sum over those with this worker's place on all hosts, in the order of hosts."""
        with self._operation("all-reduce", own, what) as name:
            self._network.sum_(own, name)

    def broadcast_between_hosts_(self, own: torch.Tensor, what: str) -> None:
        """Replace `own` (1-D) by that of who has this worker's place on the first host."""
        with self._operation("broadcast", own, what) as name:
            self._network.broadcast_(own, 0, name)

    def barrier_on_host(self, what: str) -> None:
        """Return when all members on this host have come here."""
        with self._operation("barrier", torch.empty(0), what):
            self._memory.barrier(what)

    @property
    def network_bytes(self) -> int:
        """What this worker has sent over the network."""
        return self._network.sent_bytes

    def sum_(self, tensor: torch.Tensor, what: str) -> None:
        """Replace the contiguous `tensor` by the sum over all workers.

        Raises:
            CollectiveError: a worker died, did not come in time, or called something else.
        """
        with self._operation("all-reduce", tensor, what) as name:
            even, rest, own = self._shares(tensor.view(-1))
            if even.numel() > 0:
                self._memory.reduce_scatter_(even, what)
            if rest.numel() > 0:
                self._memory.sum_(rest, what)
            self._network.sum_(own, name)
            self._collect(even, rest, what)

    def all_gather_(self, full: torch.Tensor, what: str) -> None:
        """Fill `full` (1-D), of which each worker has filled its own one of `size` equal ranges."""
        grid = self._grid
        with self._operation("all-gather", full, what) as name:
            rows = full.view(len(grid.ranks), -1)
            self._network.exchange(
                dict.fromkeys(grid.others, rows[grid.rank]),
                {host: rows[grid.peer(host)] for host in grid.others},
                name,
            )
            for of_host in full.view(grid.num_hosts, -1).unbind(0):
                self._memory.all_gather_(of_host, what)

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> None:
        """Replace the own one of `size` equal ranges of `full` (1-D) by its sum over all workers.

        The other ranges are undefined afterwards.
        """
        grid = self._grid
        with self._operation("reduce-scatter", full, what) as name:
            for for_host in full.view(grid.num_hosts, -1).unbind(0):
                self._memory.reduce_scatter_(for_host, what)
            rows = full.view(len(grid.ranks), -1)
            outgoing = {host: rows[grid.peer(host)] for host in grid.others}
            self._network.swap_and_add(outgoing, rows[grid.rank], name)

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int) -> None:
        """Replace the contiguous `tensor` by that of rank `source` of the group."""
        source_host, source_place = divmod(source, self._grid.per_host)
        with self._operation("broadcast", tensor, what) as name:
            if self._grid.host == source_host:
                self._memory.broadcast_(tensor, what, source_place)
            even, rest, own = self._shares(tensor.view(-1))
            self._network.broadcast_(own, source_host, name)
            if self._grid.host != source_host:
                self._collect(even, rest, what)

    def close(self) -> None:
        """Give back what was taken."""
        self._memory.close()

    def _shares(self, flat: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """What can be divided evenly among a host's workers, the rest, and what this worker carries.

        The last worker carries the rest, which is all of a small tensor.
        """
        k, place = self._grid.per_host, self._grid.place
        is_small = flat.numel() * flat.element_size() <= _WHOLE_BYTES
        num_even = 0 if is_small else flat.numel() - flat.numel() % k
        width = num_even // k
        end = flat.numel() if place == k - 1 else (place + 1) * width
        return flat[:num_even], flat[num_even:], flat[place * width : end]

    def _collect(self, even: torch.Tensor, rest: torch.Tensor, what: str) -> None:
        """Give all workers of this host what each of them carried."""
        if even.numel() > 0:
            self._memory.all_gather_(even, what)
        if rest.numel() > 0:
            self._memory.broadcast_(rest, what, self._grid.per_host - 1)

    @contextlib.contextmanager
    def _operation(self, kind: str, tensor: torch.Tensor, what: str) -> Iterator[str]:
        """Name an operation, and remember that it failed."""
        name = self._patience.name(f"{kind} of {what}", tensor)
        if self._failure:
            cause = f"an earlier operation failed: {self._failure}"
            raise CollectiveError(self._patience.rank, name, timed_out=False, cause=cause)
        try:
            yield f"{name} between hosts"
        except BaseException as error:
            told = self._of_the_whole(error, name)
            self._failure = str(told).splitlines()[0] if str(told) else type(told).__name__
            raise told from error

    def _of_the_whole(self, error: BaseException, name: str) -> BaseException:
        """The error to raise: one of this host's memory names but a part of the operation."""
        if not isinstance(error, CollectiveError) or error.operation.startswith(name):
            return error
        return CollectiveError(
            error.rank,
            f"{name} within its host",
            timed_out=error.timed_out,
            cause=error.cause,
            next_step=error.next_step,
        )


class _Network:
    """One worker's exchanges with those that have its place on the other hosts, its peers."""

    def __init__(self, grid: HostGrid, process_group: Any, patience: Patience) -> None:
        self._grid, self._process_group, self._patience = grid, process_group, patience
        self._scratch: dict[torch.dtype, torch.Tensor] = {}
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

    def swap_and_add(self, outgoing: Mapping[int, torch.Tensor], own: torch.Tensor, name: str) -> None:
        """Send each host what is meant for it, and add what they send to `own`, in the order of hosts."""
        received = self._room(own)
        self.exchange(outgoing, received, name)
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
        works: list[tuple[str, Any]] = []
        for call, way, messages in ((dist.irecv, "group_src", incoming), (dist.isend, "group_dst", outgoing)):
            for host, tensor in messages.items():
                if tensor.numel() == 0:
                    continue
                peer = self._grid.peer(host)
                other = f"rank {self._grid.ranks[peer]}"
                with self._patience.translated(name, other):
                    work: Any = call(
                        as_bytes(tensor), group=self._process_group, tag=_tag(tensor), **{way: peer}
                    )
                works.append((other, work))
        self.sent_bytes += sum(tensor.numel() * tensor.element_size() for tensor in outgoing.values())
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


def _tag(tensor: torch.Tensor) -> int:
    """One for each type and length: what has another length must not be written over the end of a tensor.

    Below 2^29, so that none of `Wire`'s is equal.
    """
    return 1 + (zlib.crc32(f"{tensor.dtype} {tensor.numel()}".encode()) & 0xFFFFFFF)
