"""A group of workers, and what they can do together."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist

from paceline.comm.shared_memory import SharedMemory, join_shared_memory
from paceline.errors import CollectiveError


class Pending(Protocol):
    """A collective under way."""

    def wait(self) -> None: ...


class Group:
    """Workers `0 … size-1` that take part in the same collectives.

    Every operation returns when it is done or raises `CollectiveError` within the group's time-out.
    `waited_s` adds up the seconds that this worker spent in them.

    Workers of one host that compute on its CPU talk through shared memory where `share_memory` could set
    it up, and through gloo otherwise. With gloo, two workers swap their tensors and add, instead of the
    ring all-reduce: the bytes on the wire are the same, in one message instead of two; both compute
    `a + b` of the same two numbers, so the results are equal bit for bit.
    """

    def __init__(
        self,
        process_group: Any,
        rank: int,
        size: int,
        device: torch.device,
        timeout_s: float,
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.waited_s = 0.0
        self._process_group = process_group
        self._timeout_s = timeout_s
        self._num_operations = 0
        self._swaps = size == 2 and device.type == "cpu"
        self._scratch: dict[tuple[int, torch.dtype], torch.Tensor] = {}
        self._memory: SharedMemory | None = None
        self.why_no_memory = ""
        """The reason, where `share_memory` found that memory cannot be shared."""

    @property
    def transport(self) -> str:
        """What carries this group's tensors: `none`, `shared memory`, `gloo` or `nccl`."""
        if self.size == 1:
            return "none"
        if self._memory is not None:
            return "shared memory"
        return "nccl" if self.device.type == "cuda" else "gloo"

    def share_memory(self, local_size: int) -> None:
        """Talk through shared memory from now on, if all can. A collective call.

        Args:
            local_size: how many workers are on this host, in the group or not.
        """
        self._memory, self.why_no_memory = join_shared_memory(
            self.rank, self.size, local_size, self._timeout_s, self.gather_json
        )

    def close(self) -> None:
        """Give back what `share_memory` took."""
        if self._memory is not None:
            self._memory.close()
            self._memory = None

    @classmethod
    def alone(cls, device: torch.device) -> Group:
        """A group of one: nothing is communicated."""
        return cls(None, 0, 1, device, 0.0)

    def sum_(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """Replace `tensor` (contiguous) by the sum over all workers: identical bits on each."""
        self.start_sum(tensor, what).wait()
        return tensor

    def start_sum(self, tensor: torch.Tensor, what: str) -> Pending:
        """Begin `sum_`; `tensor` holds the sum after `wait()`."""
        if self.size == 1:
            return _Done()
        name = f"all-reduce of {what}"
        if self._memory is not None:
            # Done at once: with a copy on the very cores that compute, nothing would be hidden.
            with self._counted():
                self._memory.sum_(tensor, what)
            return _Done()
        if self._swaps:
            return _Swap(self, tensor, name)
        return self._start(
            name, tensor, lambda: dist.all_reduce(tensor, group=self._process_group, async_op=True)
        )

    def gather(self, tensor: torch.Tensor, what: str) -> torch.Tensor:
        """All workers' `tensor`s (same shape), stacked in the order of rank: shape `[size, *shape]`."""
        rows = tensor.new_zeros((self.size, *tensor.shape))
        if self._memory is not None:
            with self._counted():
                self._memory.gather(tensor, rows, what)
            return rows
        rows[self.rank] = tensor
        if self.size == 1:
            return rows
        name = f"all-gather of {what}"
        if self._swaps:
            other = 1 - self.rank
            self._exchange(name, rows[self.rank], rows[other])()
        else:
            parts = list(rows.unbind(0))
            self._start(
                name,
                tensor,
                lambda: dist.all_gather(parts, tensor, group=self._process_group, async_op=True),
            ).wait()
        return rows

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int = 0) -> torch.Tensor:
        """Replace `tensor` by that of group rank `source`."""
        if self._memory is not None:
            with self._counted():
                self._memory.broadcast_(tensor, what, source)
        elif self.size > 1:
            self._start(
                f"broadcast of {what}",
                tensor,
                lambda: dist.broadcast(tensor, group=self._process_group, group_src=source, async_op=True),
            ).wait()
        return tensor

    def all_gather_(self, full: torch.Tensor, what: str) -> None:
        """Fill `full`, 1-D and divisible by the group's size, of which each worker has filled its own range."""
        if self.size == 1:
            return
        length = full.numel() // self.size
        rows = self.gather(full[self.rank * length : (self.rank + 1) * length].clone(), what)
        full.view(self.size, length).copy_(rows)

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> None:
        """Afterwards the own range of `full`, 1-D and divisible by the group's size, holds the sum over all workers."""
        self.sum_(full, what)

    def start_send(self, tensor: torch.Tensor, to: int, what: str, channel: int = 0) -> Pending:
        """Begin to send the contiguous `tensor` to group rank `to`; it must stay as it is until `wait()`.

        Messages from one worker to another on one channel arrive in order.
        """
        name = f"sending {what} to rank {to} of the group"
        return self._start(
            name,
            tensor,
            lambda: dist.isend(tensor, group=self._process_group, group_dst=to, tag=channel),
        )

    def receive_(self, tensor: torch.Tensor, source: int, what: str, channel: int = 0) -> None:
        """Fill the contiguous `tensor` with what group rank `source` sends next on this channel."""
        name = f"receiving {what} from rank {source} of the group"
        self._start(
            name,
            tensor,
            lambda: dist.irecv(tensor, group=self._process_group, group_src=source, tag=channel),
        ).wait()

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

    @contextlib.contextmanager
    def _counted(self) -> Iterator[None]:
        """Add what is done within to `waited_s`."""
        begin_s = time.perf_counter()
        try:
            yield
        finally:
            self.waited_s += time.perf_counter() - begin_s

    def _scratch_like(self, tensor: torch.Tensor) -> torch.Tensor:
        """A buffer to receive into. Kept: fresh memory costs a page fault every 4 KiB, at every step."""
        key = (tensor.numel(), tensor.dtype)
        if key not in self._scratch:
            self._scratch[key] = torch.empty(tensor.numel(), dtype=tensor.dtype, device=tensor.device)
        return self._scratch[key].view(tensor.shape)

    def _start(self, name: str, tensor: torch.Tensor, call: Callable[[], Any]) -> Pending:
        self._num_operations += 1
        name = f"{name} ({_size(tensor)}, operation {self._num_operations})"
        with self._counted(), _Translated(self, name):
            work = call()
        return _Work(self, name, [work])

    def _exchange(self, name: str, outgoing: torch.Tensor, incoming: torch.Tensor) -> Callable[[], None]:
        """Send to, and receive from, the other of two workers; the result waits for both."""
        self._num_operations += 1
        name = f"{name} ({_size(outgoing)}, operation {self._num_operations})"
        other = 1 - self.rank
        with self._counted(), _Translated(self, name):
            works = [
                dist.isend(outgoing, group=self._process_group, group_dst=other),
                dist.irecv(incoming, group=self._process_group, group_src=other),
            ]
        return _Work(self, name, works).wait


class _Done:
    def wait(self) -> None:
        return


class _Work:
    """Works of torch.distributed whose failure is raised as our own error."""

    def __init__(self, group: Group, name: str, works: Sequence[Any]) -> None:
        self._group, self._name, self._works = group, name, works

    def wait(self) -> None:
        with self._group._counted(), _Translated(self._group, self._name):
            for work in self._works:
                work.wait()


class _Swap:
    """All-reduce of two workers: swap, then add."""

    def __init__(self, group: Group, tensor: torch.Tensor, name: str) -> None:
        self._group, self._tensor = group, tensor
        self._received = group._scratch_like(tensor)
        self._wait = group._exchange(name, tensor, self._received)

    def wait(self) -> None:
        self._wait()
        with self._group._counted():
            self._tensor.add_(self._received)


class _Translated:
    """Turns torch.distributed's errors into one that names the rank and the operation."""

    def __init__(self, group: Group, name: str) -> None:
        self._group, self._name = group, name

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if not isinstance(error, RuntimeError) or isinstance(error, CollectiveError):
            return
        words = str(error).strip().splitlines()
        first = words[0] if words else type(error).__name__
        timed_out = "timed out" in first.lower() or "timeout" in first.lower()
        raise CollectiveError(
            self._group.rank,
            self._name,
            timed_out=timed_out,
            cause=(
                f"another worker did not answer within {self._group._timeout_s:.0f} s"
                if timed_out
                else f"another worker is gone or its connection broke ({first[:200]})"
            ),
        ) from error


def _size(tensor: torch.Tensor) -> str:
    num_bytes = float(tensor.numel() * tensor.element_size())
    for unit in ("B", "KiB", "MiB"):
        if num_bytes < 1024:
            return f"{num_bytes:.4g} {unit}"
        num_bytes /= 1024
    return f"{num_bytes:.4g} GiB"
