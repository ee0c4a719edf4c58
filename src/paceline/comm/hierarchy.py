"""Collectives among workers on several hosts: through memory within each host, through gloo between hosts.

A network is slower than memory by an order of magnitude, and the workers of a host share its one cable. So
what they can do among themselves they do in memory, and each carries a part of what is left over the network.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from paceline.comm.between_hosts import HostGrid, Network
from paceline.comm.memory_map import MemoryMap, join_memory
from paceline.comm.pending import Patience
from paceline.comm.shared_memory import SharedMemory
from paceline.errors import CollectiveError

_WHOLE_BYTES = 4096
"""Up to this size one worker of a host carries the whole: a message costs more than what it carries."""


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
        self._network = Network(grid, process_group, self._patience)
        self._failure = ""

    def start_sum_between_hosts(self, own: torch.Tensor, what: str, number: int) -> None:
        """Begin to add up `own` (1-D) over those with this worker's place on all hosts; see `Network.start_sum`."""
        with self._operation("all-reduce", own, what) as name:
            self._network.start_sum(own, name, number)

    def forget_rooms(self) -> None:
        """Give back what is kept to receive into."""
        self._network.forget_rooms()

    def finish_sums_between_hosts(self) -> None:
        """Complete all that were begun."""
        with self._remembered("all-reduces that were begun"):
            self._network.finish_sums()

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
        with self._remembered(name):
            try:
                yield f"{name} between hosts"
            except CollectiveError as error:
                raise self._of_the_whole(error, name) from error

    @contextlib.contextmanager
    def _remembered(self, name: str) -> Iterator[None]:
        """Remember that what is done within failed; after that nothing is done any more."""
        if self._failure:
            cause = f"an earlier operation failed: {self._failure}"
            raise CollectiveError(self._patience.rank, name, timed_out=False, cause=cause)
        try:
            yield
        except BaseException as error:
            self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise

    def _of_the_whole(self, error: CollectiveError, name: str) -> CollectiveError:
        """The error to raise: one of this host's memory names but a part of the operation."""
        if error.operation.startswith(name):
            return error
        return CollectiveError(
            error.rank,
            f"{name} within its host",
            timed_out=error.timed_out,
            cause=error.cause,
            next_step=error.next_step,
        )
