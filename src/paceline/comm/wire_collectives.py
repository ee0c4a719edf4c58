"""Collectives of a group of workers through torch.distributed: gloo on CPUs, NCCL on GPUs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.pending import Patience, Pending, Work
from paceline.comm.wire import as_bytes

# torch 2.13 renamed them.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_SMALL_BYTES = 4 << 10
"""Up to this size two workers' swap lasts as long as its messages' latency, whatever the link."""


class WireCollectives:
    """What `Group` does, and says there, for two and more workers that do not share memory.

    With gloo, two workers swap their tensors and add, instead of the ring all-reduce: the bytes on the wire are the
    same, in one message instead of two; both compute `a + b` of the same two numbers, so the results are equal bit for
    bit.
    """

    def __init__(
        self,
        process_group: Any,
        ranks: tuple[int, ...],
        rank: int,
        device: torch.device,
        patience: Patience,
    ) -> None:
        """
        Args:
            process_group: torch.distributed's group of `ranks`, in their order.
            rank: this worker's place in `ranks`.
        """
        self._process_group, self._ranks, self._rank, self._device = process_group, ranks, rank, device
        self._size = len(ranks)
        self._patience = patience
        self._swaps = self._size == 2 and device.type == "cpu"
        self._scratch: dict[tuple[int, torch.dtype], list[torch.Tensor]] = {}

    def start_sum(self, tensor: torch.Tensor, what: str) -> Pending:
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

    def start_all_gather(self, full: torch.Tensor, what: str) -> Pending:
        name = f"all-gather of {what}"
        rows = as_bytes(full).view(self._size, -1)
        if self._swaps:
            return self._swap(name, rows[self._rank], rows[1 - self._rank])
        return self._start(
            name,
            full,
            lambda: _all_gather(rows.view(-1), rows[self._rank], group=self._process_group, async_op=True),
        )

    def start_reduce_scatter(self, full: torch.Tensor, what: str) -> Pending:
        """gloo's own moves as many bytes as an all-reduce; each worker sending each its range moves half of them,
        and lets the sum be taken in the order of rank, as in shared memory.
        """
        name = f"reduce-scatter of {what}"
        rows = full.view(self._size, -1)
        own = rows[self._rank]
        if self._swaps:
            received = self._take_scratch(own.numel(), own.dtype)
            return self._swap(
                name, rows[1 - self._rank], received, lambda: self._give_back(own.add_(received), received)
            )
        if self._device.type == "cuda":
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
            lambda: self._give_back(_add_up(received.view(self._size, -1), own), received),
        )

    def start_broadcast(self, tensor: torch.Tensor, what: str, source: int) -> Pending:
        return self._start(
            f"broadcast of {what}",
            tensor,
            lambda: dist.broadcast(tensor, group=self._process_group, group_src=source, async_op=True),
        )

    def start_all_to_all(self, received: torch.Tensor, sent: torch.Tensor, what: str) -> Pending:
        return self._start(
            f"all-to-all of {what}",
            sent,
            lambda: dist.all_to_all_single(
                as_bytes(received), as_bytes(sent), group=self._process_group, async_op=True
            ),
        )

    def _take_scratch(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A buffer to receive into. Kept: fresh memory costs a page fault every 4 KiB, at every step."""
        free = self._scratch.setdefault((numel, dtype), [])
        return free.pop() if free else torch.empty(numel, dtype=dtype, device=self._device)

    def forget_rooms(self) -> None:
        """Give back what is kept to receive into."""
        for free in self._scratch.values():
            free.clear()

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
        other = 1 - self._rank
        calls = [
            lambda: dist.isend(as_bytes(outgoing), group=self._process_group, group_dst=other),
            lambda: dist.irecv(as_bytes(incoming), group=self._process_group, group_src=other),
        ]
        if outgoing.numel() * outgoing.element_size() > _SMALL_BYTES:
            calls.reverse()
        with self._patience.translated(name):
            works = [call() for call in calls]
        return Work(self._patience, name, works, finish, f"rank {self._ranks[other]}")


def _add_up(rows: torch.Tensor, into: torch.Tensor) -> torch.Tensor:
    torch.add(rows[0], rows[1], out=into)
    for row in rows[2:]:
        into.add_(row)
    return into
