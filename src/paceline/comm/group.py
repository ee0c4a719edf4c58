"""A group of workers, and what they can do together."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm import mailbox
from paceline.comm.between_hosts import HostGrid
from paceline.comm.hierarchy import Hierarchy, arrange, join_host_memory
from paceline.comm.mailbox import Mailbox
from paceline.comm.memory_map import MemoryMap, join_memory
from paceline.comm.pending import Done, Patience, Pending
from paceline.comm.shared_memory import SharedMemory, memory_bytes
from paceline.comm.wire import NcclWire, Wire
from paceline.comm.wire_collectives import WireCollectives

__all__ = ["Group", "Pending"]


class Group:
    """Workers `0 … size-1` that take part in the same operations. `ranks` are their ranks in the world.

    Every operation returns when it is done or raises `CollectiveError` within the group's time-out; its `what` is
    for that message. `waited_s` adds up the seconds that this worker spent in them. A group of one does nothing.

    Workers of one host that compute on its CPU talk through shared memory where `share_memory` (and `open_mailbox`,
    for messages) could set it up; equally many on several hosts through shared memory within each host and gloo
    between hosts (`Hierarchy`); others through gloo or NCCL (`WireCollectives`).
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
        self._wired = WireCollectives(process_group, ranks, rank, device, self._patience)
        self._memory: SharedMemory | Hierarchy | None = None
        self._mailbox: Mailbox | None = None
        self._wire: Wire | None = None
        self._num_wires = 0
        """That were closed."""
        self._has_ring = False
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

    def forget_messages(self) -> None:
        """Throw away what has come through shared memory and was not received, where a step has failed in its middle.

        All members call it, and none sends until all have.
        """
        if self._mailbox is not None:
            self._mailbox.forget()

    def forget_rooms(self) -> None:
        """Give back what is kept to receive into, from one operation to the next of its size. None is under way."""
        self._wired.forget_rooms()
        if isinstance(self._memory, Hierarchy):
            self._memory.forget_rooms()
        if self._wire is not None:
            self._wire.forget_rooms()

    def close(self) -> None:
        """Give back what `share_memory` and `open_mailbox` took. The group goes on without."""
        if self.device.type == "cuda":
            if self._wire is not None:
                self._wire.close()
            self._wire, self._has_ring, self._num_wires = None, False, self._num_wires + 1
        for taken in (self._memory, self._mailbox):
            if taken is not None:
                taken.close()
        self._memory = self._mailbox = self.grid = None

    def leave(self) -> None:
        """`close`, and the process group with it, which nobody uses any more. All its workers call it."""
        self.close()
        if self.size > 1:
            dist.destroy_process_group(self._process_group)

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
        return self._wired.start_sum(tensor, what)

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
        return self._wired.start_all_gather(full, what)

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> torch.Tensor:
        """Let the own range of `full` (as in `all_gather_`) hold the sum over all workers; the rest is undefined."""
        self.start_reduce_scatter(full, what).wait()
        return full

    def start_reduce_scatter(self, full: torch.Tensor, what: str) -> Pending:
        """Begin `reduce_scatter_`; `full` is left alone until `wait()`."""
        if self.size == 1 or full.numel() == 0:
            return Done()
        if self._memory is not None:
            with self._patience.counted():
                self._memory.reduce_scatter_(full, what)
            return Done()
        return self._wired.start_reduce_scatter(full, what)

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
            self._wired.start_broadcast(tensor, what, source).wait()
        return tensor

    def all_to_all_(self, received: torch.Tensor, sent: torch.Tensor, what: str) -> torch.Tensor:
        """Exchange equal ranges of `sent` (1-D): the one numbered `r` goes to rank `r`, and is `received` by sender."""
        if self.size == 1:
            received.copy_(sent)
        elif isinstance(self._memory, SharedMemory):
            with self._patience.counted():
                self._memory.all_to_all(received.chunk(self.size), sent.chunk(self.size), what)
        else:
            self._wired.start_all_to_all(received, sent, what).wait()
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

    def receive_(
        self, tensor: torch.Tensor, source: int, what: str, channel: int = 0, rounds_ahead: int = 0
    ) -> torch.Tensor:
        """Fill the contiguous `tensor` with what group rank `source` sends next on this channel.

        Args:
            rounds_ahead: where messages follow each other in the same order again and again, as those of micro-batches
                do: so many rounds are awaited ahead, in memory of their own, so that they come while this worker sends.
                0: the next message alone. For gloo; others need no such thing.

        Raises:
            CollectiveError: also where the message has another type or number of elements.
        """
        if self._mailbox is not None:
            with self._patience.counted():
                self._mailbox.receive_(tensor, source, what, channel)
        else:
            self._take_wire().receive_(tensor, source, what, channel, rounds_ahead)
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

    def open_links(self) -> None:
        """On GPUs: have neighbours meet that will send each other messages, unless they have. As `share_memory`."""
        if not self._has_ring and self.device.type == "cuda" and self.size > 1:
            wire = self._take_wire()
            assert isinstance(wire, NcclWire)
            wire.open_ring()
            self._has_ring = True

    def _take_wire(self) -> Wire:
        if self._wire is None:
            about = self._process_group, self.ranks, self.device, self._patience
            self._wire = NcclWire(*about, self.wire_name) if self.device.type == "cuda" else Wire(*about)
        return self._wire

    @property
    def wire_name(self) -> str:
        """Of what carries its messages: the same on all its workers, and no other's before or after."""
        return f"{self._process_group.group_name}/{self._num_wires}"


class _Posted:
    """A message in the mailbox."""

    def __init__(self, patience: Patience, posted: Mailbox, what: str) -> None:
        self._patience, self._mailbox, self._what = patience, posted, what

    def wait(self) -> None:
        with self._patience.counted():
            self._mailbox.flush(self._what)
