"""A group of workers, and what they can do together."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm import mailbox
from paceline.comm.between_hosts import HostGrid
from paceline.comm.hierarchy import Hierarchy, arrange, join_host_memory
from paceline.comm.mailbox import Mailbox
from paceline.comm.memory_map import MemoryMap, join_memory
from paceline.comm.pending import Done, Patience, Pending, Work
from paceline.comm.shared_memory import SharedMemory, memory_bytes
from paceline.comm.wire import NcclWire, Wire, as_bytes

__all__ = ["Group", "Pending"]

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_SMALL_BYTES = 4 << 10
"""Up to this size two workers' swap lasts as long as its messages' latency, whatever the link."""


class Group:
    """Workers `0 … size-1` that take part in the same operations. `ranks` are their ranks in the world.

    Every operation returns when it is done or raises `CollectiveError` within the group's time-out; its `what` is
    for that message. `waited_s` adds up the seconds that this worker spent in them. A group of one does nothing.

    Workers of one host that compute on its CPU talk through shared memory where `share_memory` (and `open_mailbox`,
    for messages) could set it up; equally many on several hosts through shared memory within each host and gloo
    between hosts (`Hierarchy`); others through gloo. With gloo, two workers swap their tensors and add, instead of the
    ring all-reduce: the bytes on the wire are the same, in one message instead of two; both compute `a + b` of the
    same two numbers, so the results are equal bit for bit.
    """

    def __init__(
        self,
        process_group: Any,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        """
        Args:
            process_group: torch.distributed's group of `ranks`, in their order.
            rank: this worker's place in `ranks`.
        """
        self.ranks = ranks
        self.rank = rank
        self.size = len(ranks)
        self.device = device
        self._process_group = process_group
        self._patience = Patience(ranks[rank], timeout_s)
        self._swaps = self.size == 2 and device.type == "cpu"
        self._scratch: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}
        self._memory: SharedMemory | Hierarchy | None = None
        self._mailbox: Mailbox | None = None
        self._wire: Wire | None = None
        self.why_no_memory = ""
        """The reason, where `share_memory` found that memory cannot be shared."""
        self.is_over_network = False
        """Whether its workers, which compute on CPUs, are on several hosts."""
        self.grid: HostGrid | None = None
        """Who is on which host, where the workers of each host talk through its memory."""

    @property
    def transport(self) -> str:
        """What carries this group's tensors: `none`, `shared memory`, `shared memory + gloo`, `gloo` or `nccl`."""
        if self.size == 1:
            return "none"
        if isinstance(self._memory, Hierarchy):
            return "shared memory + gloo"
        if self._memory is not None:
            return "shared memory"
        return "nccl" if self.device.type == "cuda" else "gloo"

    @property
    def waited_s(self) -> float:
        """Seconds that this worker has spent in the group's operations."""
        return self._patience.waited_s

    @property
    def has_mailbox(self) -> bool:
        """Whether messages travel through shared memory."""
        return self._mailbox is not None

    def share_memory(self, hosts: Sequence[int], local_size: int, *, spins: bool) -> None:
        """Talk through shared memory from now on, within each host, if all can. A collective call.

        Args:
            hosts: each member's host, as a number; ascending.
            local_size: how many workers are on this host, in the group or not.
            spins: whether every worker that computes has a core of its own: a wait then looks before it sleeps.
        """
        timeout_s = self._patience.timeout_s
        grid, self.why_no_memory = arrange(self.ranks, self.rank, hosts)
        if grid is None:
            return
        memory, self.why_no_memory = self._join(grid, local_size, (0,), memory_bytes(grid.per_host))
        if memory is None:
            return
        self.grid = grid
        self._memory = within = SharedMemory(memory, self.ranks[grid.row], timeout_s, spins=spins)
        if grid.num_hosts > 1:
            self._memory = Hierarchy(within, grid, self._process_group, timeout_s)

    def _join(
        self, grid: HostGrid, local_size: int, makers: Sequence[int], data_bytes: int
    ) -> tuple[MemoryMap | None, str]:
        if grid.num_hosts > 1:
            return join_host_memory(grid, local_size, makers, data_bytes, self.gather_json)
        return join_memory(self.rank, self.size, local_size, makers, data_bytes, self.gather_json)

    def open_mailbox(self, local_size: int, *, spins: bool) -> None:
        """Send and receive through shared memory from now on, if all can: workers of one host. As `share_memory`."""
        memory, self.why_no_memory = join_memory(
            self.rank,
            self.size,
            local_size,
            range(self.size),
            mailbox.head_bytes(self.size),
            self.gather_json,
            mailbox.OUTBOX_BYTES,
        )
        if memory is not None:
            self._mailbox = Mailbox(memory, self.ranks, self._patience.timeout_s, spins=spins)

    def map_memory(self, makers: Sequence[int], data_bytes: int) -> MemoryMap:
        """Map a stretch of memory from each of the places `makers` of a host into its workers. A collective call.

        Only where there is a `grid`.

        Raises:
            OSError: there is not enough memory, on some host.
        """
        assert self.grid is not None
        memory, reason = self._join(self.grid, self.grid.per_host, makers, data_bytes)
        if memory is None:
            raise OSError(0, reason)
        return memory

    def start_sum_between_hosts(self, own: torch.Tensor, what: str, number: int) -> None:
        """Begin to add up `own` (1-D) over the workers with the same place on all hosts, in the order of hosts.

        Returns at once; `own` holds the sum after `finish_sums_between_hosts`. On one host it stays as it is. Hosts may
        begin theirs in different orders: those under way together are told apart by their numbers, from 0.
        """
        if isinstance(self._memory, Hierarchy):
            with self._patience.counted():
                self._memory.start_sum_between_hosts(own, what, number)

    def finish_sums_between_hosts(self) -> None:
        """Return when all sums are there that were begun."""
        if isinstance(self._memory, Hierarchy):
            with self._patience.counted():
                self._memory.finish_sums_between_hosts()

    def broadcast_between_hosts_(self, own: torch.Tensor, what: str) -> None:
        """Replace `own` (1-D) by that of the worker with the same place on the first host."""
        if isinstance(self._memory, Hierarchy):
            with self._patience.counted():
                self._memory.broadcast_between_hosts_(own, what)

    def barrier_on_host(self, what: str) -> None:
        """Return when all workers on this host have come here. Only where there is a `grid`."""
        assert self._memory is not None
        with self._patience.counted():
            if isinstance(self._memory, Hierarchy):
                self._memory.barrier_on_host(what)
            else:
                self._memory.barrier(what)

    def close(self) -> None:
        """Give back what `share_memory` and `open_mailbox` took. The group goes on without."""
        for taken in (self._memory, self._mailbox):
            if taken is not None:
                taken.close()
        self._memory = self._mailbox = self.grid = None

    @classmethod
    def alone(cls, device: torch.device, rank: int = 0) -> Group:
        """A group of one: nothing is communicated."""
        return cls(None, (rank,), 0, device, 0.0)

    def sum_(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Replace `tensor` (contiguous) by the sum over all workers: identical bits on each."""
        self.start_sum(tensor, what).wait()
        return tensor

    def start_sum(self, tensor: torch.Tensor, what: str) -> Pending:
        """Begin `sum_`; `tensor` holds the sum after `wait()`."""
        if self.size == 1:
            return Done()
        if self._memory is not None:
            # Done at once: with a copy on the very cores that compute, nothing would be hidden.
            with self._patience.counted():
                self._memory.sum_(tensor, what)
            return Done()
        name = f"all-reduce of {what}"
        if self._swaps:
            received = self._take_scratch(tensor.numel(), tensor.dtype)
            return self._swap(
                name,
                tensor,
                received,
                lambda: self._give_back(tensor.add_(received.view(tensor.shape)), received),
            )
        return self._start(
            name, tensor, lambda: dist.all_reduce(tensor, group=self._process_group, async_op=True)
        )

    def all_gather_(self, full: torch.Tensor, what: str) -> torch.Tensor:
        """Fill `full` (1-D, contiguous, divisible by the size), of which each worker has filled its own range.

        Ranges are equal and in the order of rank.
        """
        self.start_all_gather(full, what).wait()
        return full

    def start_all_gather(self, full: torch.Tensor, what: str) -> Pending:
        """Begin `all_gather_`; `full` is complete after `wait()`, and left alone until then."""
        if self.size == 1 or full.numel() == 0:
            return Done()
        if self._memory is not None:
            with self._patience.counted():
                self._memory.all_gather_(full, what)
            return Done()
        name = f"all-gather of {what}"
        rows = as_bytes(full).view(self.size, -1)
        if self._swaps:
            return self._swap(name, rows[self.rank], rows[1 - self.rank])
        return self._start(
            name,
            full,
            lambda: _all_gather(rows.view(-1), rows[self.rank], group=self._process_group, async_op=True),
        )

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> torch.Tensor:
        """Let the own range of `full` (as in `all_gather_`) hold the sum over all workers; the rest is undefined."""
        self.start_reduce_scatter(full, what).wait()
        return full

    def start_reduce_scatter(self, full: torch.Tensor, what: str) -> Pending:
        """Begin `reduce_scatter_`; `full` is left alone until `wait()`.

        gloo's own moves as many bytes as an all-reduce; each worker sending each its range moves half of them,
        and lets the sum be taken in the order of rank, as in shared memory.
        """
        if self.size == 1 or full.numel() == 0:
            return Done()
        if self._memory is not None:
            with self._patience.counted():
                self._memory.reduce_scatter_(full, what)
            return Done()
        name = f"reduce-scatter of {what}"
        rows = full.view(self.size, -1)
        own = rows[self.rank]
        if self._swaps:
            received = self._take_scratch(own.numel(), own.dtype)
            return self._swap(
                name, rows[1 - self.rank], received, lambda: self._give_back(own.add_(received), received)
            )
        if self.device.type == "cuda":
            return self._start(
                name, full, lambda: _reduce_scatter(own, full, group=self._process_group, async_op=True)
            )
        received = self._take_scratch(full.numel(), full.dtype)
        return self._start(
            name,
            full,
            lambda: dist.all_to_all_single(
                as_bytes(received), as_bytes(full), group=self._process_group, async_op=True
            ),
            lambda: self._give_back(_add_up(received.view(self.size, -1), own), received),
        )

    def gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """All workers' `tensor`s (same shape), stacked in the order of rank: shape `[size, *shape]`."""
        rows = tensor.new_zeros((self.size, *tensor.shape))
        rows[self.rank] = tensor
        self.all_gather_(rows.view(-1), what)
        return rows

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int = 0) -> torch.Tensor:
        """Replace `tensor` by that of group rank `source`."""
        if self._memory is not None:
            with self._patience.counted():
                self._memory.broadcast_(tensor, what, source)
        elif self.size > 1:
            self._start(
                f"broadcast of {what}",
                tensor,
                lambda: dist.broadcast(tensor, group=self._process_group, group_src=source, async_op=True),
            ).wait()
        return tensor

    def all_to_all_(self, received: torch.Tensor, sent: torch.Tensor, what: str) -> torch.Tensor:
        """Exchange equal ranges of `sent` (1-D): the one numbered `r` goes to rank `r`, and is `received` by sender."""
        if self.size == 1:
            received.copy_(sent)
        elif isinstance(self._memory, SharedMemory):
            with self._patience.counted():
                self._memory.all_to_all(received.chunk(self.size), sent.chunk(self.size), what)
        else:
            self._start(
                f"all-to-all of {what}",
                sent,
                lambda: dist.all_to_all_single(
                    as_bytes(received), as_bytes(sent), group=self._process_group, async_op=True
                ),
            ).wait()
        return received

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int = 0) -> Pending:
        """Begin to send the contiguous `tensor` to group rank `to`. Returns at once.

        Messages of a pair in one direction on one channel arrive in the order sent; on different channels they
        may be received in any order. Through gloo and NCCL the tensor must stay as it is until `wait()`, which
        may wait for the receiver.
        """
        if self._mailbox is not None:
            with self._patience.counted():
                self._mailbox.send(tensor, to, what, channel)
            return _Posted(self._patience, self._mailbox, what)
        return self._take_wire().start_send(tensor, to, what, channel)

    def receive_(self, tensor: torch.Tensor, source: int, what: str, channel: int = 0) -> torch.Tensor:
        """Fill the contiguous `tensor` with what group rank `source` sends next on this channel.

        Raises:
            CollectiveError: also where the message has another type or number of elements.
        """
        if self._mailbox is not None:
            with self._patience.counted():
                self._mailbox.receive_(tensor, source, what, channel)
        else:
            self._take_wire().receive_(tensor, source, what, channel)
        return tensor

    def gather_json(self, value: Any, what: str) -> list[Any]:
        """Every worker's `value` (anything that JSON can say), in the order of rank."""
        text = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8).to(self.device)
        lengths = self.gather(torch.tensor([len(text)], device=self.device), f"the length of {what}").view(-1)
        padded = text.new_zeros(int(lengths.max()))
        padded[: len(text)] = text
        rows = self.gather(padded, what).cpu()
        return [
            json.loads(bytes(row[:length].tolist()))
            for row, length in zip(rows, lengths.tolist(), strict=True)
        ]

    def barrier(self, what: str) -> None:
        """Return when every worker has come here."""
        self.sum_(torch.zeros(1, device=self.device), f"a barrier ({what})")

    def _take_wire(self) -> Wire:
        if self._wire is None:
            kind = NcclWire if self.device.type == "cuda" else Wire
            self._wire = kind(self._process_group, self.ranks, self.device, self._patience)
        return self._wire

    def _take_scratch(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer to receive into. Kept: fresh memory costs a page fault every 4 KiB, at every step."""
        free = self._scratch.setdefault((numel, dtype), [])
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self.device)

    def _give_back(self, result: torch.Tensor, scratch: torch.Tensor) -> None:
        """After `result` was made from it."""
        del result
        self._scratch[scratch.numel(), scratch.dtype].append(scratch)

    def _start(
        self,
        operation: str,
        tensor: torch.Tensor,
        call: Callable[[], Any],
        finish: Callable[[], object] | None = None,
    ) -> Pending:
        name = self._patience.name(operation, tensor)
        with self._patience.translated(name):
            work = call()
        return Work(self._patience, name, [work], finish)

    def _swap(
        self,
        operation: str,
        outgoing: torch.Tensor,
        incoming: torch.Tensor,
        finish: Callable[[], object] | None = None,
    ) -> Pending:
        """Send to, and receive from, the other of two workers.

        Of large tensors the receiving begins first: gloo sends nothing before it has heard that it is awaited, and that
        word would queue behind what this worker sends: one way after the other. Of small ones that hardly matters, and
        the other order is quicker.
        """
        name = self._patience.name(operation, outgoing)
        other = 1 - self.rank
        calls = [
            lambda: dist.isend(as_bytes(outgoing), group=self._process_group, group_dst=other),
            lambda: dist.irecv(as_bytes(incoming), group=self._process_group, group_src=other),
        ]
        if outgoing.numel() * outgoing.element_size() > _SMALL_BYTES:
            calls.reverse()
        with self._patience.translated(name):
            works = [call() for call in calls]
        return Work(self._patience, name, works, finish, f"rank {self.ranks[other]}")


class _Posted:
    """A message in the mailbox."""

    def __init__(self, patience: Patience, posted: Mailbox, what: str) -> None:
        self._patience, self._mailbox, self._what = patience, posted, what

    def wait(self) -> None:
        with self._patience.counted():
            self._mailbox.flush(self._what)


def _add_up(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    torch.add(rows[0], rows[1], out=into)
    for row in rows[2:]:
        into.add_(row)
    return into
