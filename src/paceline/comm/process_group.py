"""The backend `shm` of torch.distributed: process groups whose members share memory.

    paceline.register_shm()
    torch.distributed.init_process_group("shm")  # or "cpu:shm,cuda:nccl"

DDP, FSDP2, DTensor, pipelines and checkpoints then use it without knowing. Where the members cannot share memory the
group is a gloo group, and one warning says why.
"""

from __future__ import annotations

import datetime
import os
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, Work

from paceline.comm.collective_group import CollectiveGroup, is_served
from paceline.comm.flight_recorder import ANY_SOURCE, RECEIVE, SEND, Record, pack_call
from paceline.comm.mailbox import Mailbox
from paceline.comm.meeting import meet
from paceline.comm.shared_memory import SharedMemory
from paceline.comm.staging import contiguous
from paceline.comm.works import FinishedWork, Inbox, Sent

BACKEND = "shm"
_MESSAGE = "a message"


def register_shm() -> None:
    """Make the backend `shm` known to torch.distributed. A second call does nothing."""
    if BACKEND not in dist.Backend.backend_list:
        dist.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def records(group: dist.ProcessGroup | None = None) -> dict[int, list[Record]]:
    """The last 16 operations of each member of a `shm` group, oldest first, by its rank in the world.

    Args:
        group: None: the default group.

    Raises:
        TypeError: it is a group of another backend.
    """
    group = group or dist.group.WORLD
    if not isinstance(group, SharedMemoryGroup):
        raise TypeError(f"{type(group).__name__} keeps no records: is the group's backend {BACKEND!r}?")
    return group.memory.records()


def _create(options: Any, _: Any) -> Any:
    """Called by torch.distributed for each new group, on each of its members."""
    rank, size = options.group_rank, options.group_size
    ranks = tuple(options.global_ranks_in_group) or tuple(range(size))
    default_size = dist.get_world_size() if dist.is_initialized() else size
    num_workers = int(os.environ.get("LOCAL_WORLD_SIZE", default_size))
    met = meet(options.store, ranks, rank, num_workers, options.timeout)
    if isinstance(met, str):
        warnings.warn(
            f"process group {options.group_id} uses gloo instead of shared memory: {met}", stacklevel=2
        )
        return dist.ProcessGroupGloo(options.store, rank, size, timeout=options.timeout)
    return SharedMemoryGroup(options.store, rank, size, options.timeout, *met)


class SharedMemoryGroup(CollectiveGroup):
    """A process group of torch.distributed whose members are processes of one host. Made by `init_process_group`.

    Collectives are done when the call returns, asynchronous or not: what moves the bytes are the very cores that
    compute, so that a thread for it takes from the computation what it hides (docs/decisions/0005).
    `isend` copies and returns; `irecv` is filled when somebody waits. Reductions are exact and repeatable
    (`Reduction`). Errors are `CollectiveError`s, raised by the call or by `wait()`.

    What shared memory cannot carry (sparse tensors, tensors on a GPU, `PREMUL_SUM`, …) goes to a group of gloo or
    NCCL that is made on the first such call; one warning says so.

    One thread at a time may use a group. Cost of a call beyond `SharedMemory`'s: about 5 µs.
    """

    def __init__(
        self,
        store: Store,
        rank: int,
        size: int,
        timeout: datetime.timedelta,
        memory: SharedMemory,
        mailbox: Mailbox,
    ) -> None:
        super().__init__(store, rank, size, timeout, memory)
        self._mailbox = mailbox
        self._recorder = memory.phases.recorder
        self._inbox = Inbox(mailbox, rank, size, self._recorder)
        self._name = self._desc = ""

    # What a process group is asked about itself.

    def size(self) -> int:
        return self._size

    def rank(self) -> int:
        return self._rank

    def getBackendName(self) -> str:  # noqa: N802
        return BACKEND

    def _set_group_name(self, name: Any) -> None:
        self._name = name
        self._what = f"a tensor in process group {name}"

    setGroupName = _set_group_name  # noqa: N815

    @property
    def group_name(self) -> Any:
        return self._name

    @property
    def pg_name(self) -> str:
        return self._name

    def getGroupName(self) -> str:  # noqa: N802
        return self._name

    def _set_group_desc(self, desc: str) -> None:
        self._desc = desc

    setGroupDesc = _set_group_desc  # noqa: N815

    @property
    def group_desc(self) -> str:
        return self._desc

    def getGroupDesc(self) -> str:  # noqa: N802
        return self._desc

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """From now on no call waits longer than this."""
        self.memory.phases.timeout_s = self._mailbox.timeout_s = timeout.total_seconds()
        self._others.set_timeout(timeout)

    setTimeout = set_timeout  # noqa: N815

    def _set_sequence_number_for_group(self) -> None:
        """Operations are counted from the beginning."""

    def _get_sequence_number_for_group(self) -> int:
        return self._recorder.num_entered

    def _start_coalescing(self, device: torch.device) -> None:
        """Nothing is put off: each call is done when it returns."""

    def _end_coalescing(self, device: torch.device) -> Work:
        return FinishedWork()

    def abort(self) -> None:
        """Let all later calls fail, here and within 50 ms on the members that wait for this one."""
        self.memory.phases.give_up("the group was aborted")
        self._mailbox.give_up("the group was aborted")
        self._others.call("abort")

    def shutdown(self) -> None:
        """Give back what the group holds. The memory goes with the last member that maps it."""
        self.memory.phases.end("the group was shut down")
        self._mailbox.give_up("the group was shut down")
        self.memory.close()
        self._mailbox.close()
        self._others.call("shutdown")

    # Messages.

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work:
        """Send to rank `to` of the group; never waits."""
        (tensor,) = tensors
        if not is_served(tensor):
            return self._others.run("send", tensor, tensors, to, tag)
        if to == self._rank:
            raise self.refusal("send", f"rank {to} of the group sends to itself")
        record = self._recorder.enter(pack_call(SEND, tensor.dtype, tensor.numel(), root=to))
        self._mailbox.send(contiguous(tensor), to, _MESSAGE, tag)
        self._recorder.leave(record)
        return Sent(self._mailbox, _MESSAGE)

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work:
        """Begin to receive from rank `source` of the group; filled in `wait()`."""
        (tensor,) = tensors
        if not is_served(tensor):
            return self._others.run("recv", tensor, tensors, source, tag)
        if source == self._rank:
            raise self.refusal("receive", f"rank {source} of the group receives from itself")
        record = self._recorder.enter(pack_call(RECEIVE, tensor.dtype, tensor.numel(), root=source))
        return self._inbox.post(tensor, source, tag, record)

    def recv_anysource(self, tensors: list[torch.Tensor], tag: int) -> Work:
        """Begin to receive from whoever sends first; filled in `wait()`."""
        (tensor,) = tensors
        if not is_served(tensor):
            return self._others.run("recv_anysource", tensor, tensors, tag)
        record = self._recorder.enter(pack_call(RECEIVE, tensor.dtype, tensor.numel(), root=ANY_SOURCE))
        return self._inbox.post(tensor, ANY_SOURCE, tag, record)

    recvAnysource = recv_anysource  # noqa: N815
