"""Collectives through memory that the workers of one host all map.

TCP on loopback costs half a millisecond or more for the smallest message and copies every byte through the
kernel; memory costs what memory costs. Linux on x86-64: the order in which one worker's writes become
visible to another is what that processor guarantees.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import platform
import secrets
import select
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline.errors import LOOK_FOR_THE_FIRST, CollectiveError
from paceline.measure.machine import usable_cores

SLOT_BYTES = 1 << 20
"""Larger tensors travel in pieces of this size, so that a piece is still in the cache when it is read."""
_ONE_PHASE_BYTES = 32 << 10
"""Up to this size every one of more than two workers adds up everything: half the waits, more reading."""
_SPIN_S = 200e-6
"""How long a wait looks before it sleeps, where every worker has a core of its own."""
_SLICE_S = 0.05
"""How often a sleeping worker looks whether the others still live."""

_PAGE_BYTES = 4096
_ROW_BYTES = 128
"""One worker's counters: two cache lines, as processors fetch them in pairs."""
_TOKEN_BYTES = 16
_WORD_BYTES = 8
_COUNT, _SIGNATURES = 0, 1
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1
_KINDS = ("all-reduce", "all-gather", "broadcast")


class SharedMemory:
    """Memory shared by workers `0 … size-1` of one host, and their collectives on CPU tensors.

    Every operation is a row of phases. In a phase a worker writes its slot, publishes the phase's number,
    waits until all have published it, and reads the others' slots. Each worker has two slots, used in
    turn: who has published phase k+1 has read what it wanted of phase k, so that in phase k+2 the slot of
    phase k may be written again. One wait per phase, and no lock.

    Cost per worker of summing b bytes, in memory traffic: two workers read 3b and write 2b; n of them read
    about (n+1)b up to 32 KiB and 5b above, and write 2b and 4b. A phase takes about 10 µs where the others are
    already there, and 30 to 100 µs with the wait for them (docs/log.md).

    The memory has no name in any file system and its size is reserved beforehand: whatever dies, nothing
    stays behind, and memory that is not there is found missing when it is made, not by a crash later.

    After an operation has failed all later ones fail: the workers no longer agree on what comes next.
    """

    def __init__(self, memory: mmap.mmap, rank: int, peers: dict[int, int], size: int, timeout_s: float):
        self._rank, self._size, self._timeout_s = rank, size, timeout_s
        self._peers = peers
        """Of each other worker, a descriptor that becomes readable when it dies."""
        self._memory = memory
        self._words = memoryview(memory)[: _header_bytes(size)].cast("q")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._phase = 0
        self._spin_s = _SPIN_S if size <= len(usable_cores()) else 0.0
        self._slots: dict[torch.dtype, list[list[torch.Tensor]]] = {}
        self._deaths = select.poll()
        for descriptor in peers.values():
            self._deaths.register(descriptor, select.POLLIN)
        self._libc = ctypes.CDLL(None)
        self._failure = ""

    def sum_(self, tensor: torch.Tensor, what: str) -> None:
        """Replace the contiguous `tensor` by the sum over all workers, added in the order of rank.

        Raises:
            CollectiveError: a worker died, did not come in time, or called something else.
        """
        flat = tensor.view(-1)
        slot_numel = SLOT_BYTES // tensor.element_size()
        for begin in range(0, flat.numel(), slot_numel):
            piece = flat[begin : begin + slot_numel]
            if self._size == 2:
                slots = self._exchange(piece, "all-reduce", what)
                piece.add_(slots[1 - self._rank])
            elif piece.numel() * piece.element_size() <= _ONE_PHASE_BYTES:
                _add_up(self._exchange(piece, "all-reduce", what), piece)
            else:
                self._sum_in_shards(piece, what)

    def close(self) -> None:
        """Stop watching the others. The memory itself goes with the last process that maps it."""
        for descriptor in self._peers.values():
            os.close(descriptor)
        self._peers = {}

    def _sum_in_shards(self, piece: torch.Tensor, what: str) -> None:
        """Each worker adds up one shard; then all collect the shards."""
        bounds = [rank * piece.numel() // self._size for rank in range(self._size + 1)]
        begin, end = bounds[self._rank], bounds[self._rank + 1]
        own = piece[begin:end]
        slots = self._exchange(piece, "all-reduce", what)
        _add_up([slot[begin:end] for slot in slots], own)
        lengths = [bounds[rank + 1] - bounds[rank] for rank in range(self._size)]
        shards = self._exchange(own, "all-reduce", what, lengths)
        for rank, shard in enumerate(shards):
            if rank != self._rank:
                piece[bounds[rank] : bounds[rank + 1]].copy_(shard)

    def gather(self, tensor: torch.Tensor, rows: torch.Tensor, what: str) -> None:
        """Fill `rows`, shape `[size, *shape]`, with every worker's `tensor` in the order of rank."""
        flat, flat_rows = tensor.reshape(-1), rows.view(self._size, -1)
        slot_numel = SLOT_BYTES // tensor.element_size()
        for begin in range(0, flat.numel(), slot_numel):
            piece = flat[begin : begin + slot_numel]
            for row, slot in zip(flat_rows, self._exchange(piece, "all-gather", what), strict=True):
                row[begin : begin + slot_numel].copy_(slot)

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int) -> None:
        """Replace the contiguous `tensor` by that of rank `source`."""
        flat = tensor.view(-1)
        slot_numel = SLOT_BYTES // tensor.element_size()
        for begin in range(0, flat.numel(), slot_numel):
            piece = flat[begin : begin + slot_numel]
            slots = self._exchange(piece, "broadcast", what, source=source)
            if self._rank != source:
                piece.copy_(slots[source])

    def _exchange(
        self,
        piece: torch.Tensor,
        kind: str,
        what: str,
        lengths: list[int] | None = None,
        *,
        source: int | None = None,
    ) -> list[torch.Tensor]:
        """One phase: everyone's slot, to be read before the next.

        Args:
            lengths: elements in each slot; None: as many as in `piece`.
            source: the only one that writes; None: all do.
        """
        name = f"{kind} of {what}"
        if self._failure:
            raise self._error(name, f"an earlier operation failed: {self._failure}", timed_out=False)
        if piece.dtype not in _DTYPES:
            raise self._error(name, f"{piece.dtype} has no place in shared memory", timed_out=False)
        try:
            self._phase_of(piece, kind, name, lengths, source)
        except BaseException as error:
            self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise
        slots = self._typed_slots(piece.dtype)[self._phase % 2]
        lengths = lengths or [piece.numel()] * self._size
        return [slot[:length] for slot, length in zip(slots, lengths, strict=True)]

    def _phase_of(
        self, piece: torch.Tensor, kind: str, name: str, lengths: list[int] | None, source: int | None
    ) -> None:
        """Write, publish, wait, and see that all called the same."""
        self._phase += 1
        parity = self._phase % 2
        if source is None or source == self._rank:
            self._typed_slots(piece.dtype)[parity][self._rank][: piece.numel()].copy_(piece)
        # What all must agree on: in a phase of shards, whose lengths differ, that of rank 0.
        numel = piece.numel() if lengths is None else lengths[0]
        signature = _signature(kind, piece.dtype, source or 0, numel)
        own = self._rank * _ROW_BYTES // _WORD_BYTES
        self._words[own + _SIGNATURES + parity] = signature
        self._words[own + _COUNT] = self._phase
        self._futex(self._rank, _FUTEX_WAKE, 0x7FFFFFFF, None)
        self._wait(name)
        for rank in range(self._size):
            theirs = self._words[rank * _ROW_BYTES // _WORD_BYTES + _SIGNATURES + parity]
            if theirs != signature:
                self._fail_mismatch(rank, name, signature, theirs)

    def _typed_slots(self, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """`[parity][rank]`: the slots as 1-D tensors of `dtype`."""
        if dtype not in self._slots:
            offset = _header_bytes(self._size)
            flat = torch.frombuffer(self._memory, dtype=dtype, offset=offset)
            table = flat.view(2, self._size, -1)
            self._slots[dtype] = [list(row.unbind(0)) for row in table.unbind(0)]
        return self._slots[dtype]

    def _wait(self, name: str) -> None:
        """Return when all workers have published the present phase."""
        deadline_s = 0.0
        for rank in self._peers:
            word = rank * _ROW_BYTES // _WORD_BYTES
            if self._words[word] >= self._phase:
                continue
            begin_s = time.perf_counter()
            while self._words[word] < self._phase and time.perf_counter() - begin_s < self._spin_s:
                pass
            while (count := self._words[word]) < self._phase:
                deadline_s = deadline_s or begin_s + self._timeout_s
                self._futex(rank, _FUTEX_WAIT, count & 0xFFFFFFFF, _SLICE_S)
                if self._words[word] < self._phase:
                    self._check_alive(name)
                    if time.perf_counter() > deadline_s:
                        self._fail_timed_out(rank, name)

    def _futex(self, rank: int, operation: int, value: int, wait_s: float | None) -> None:
        """futex(2) on the low half of a worker's counter. Interruptions and changed values just return."""
        wait = None if wait_s is None else ctypes.byref(_Timespec(int(wait_s), int(wait_s % 1 * 1e9)))
        address = ctypes.c_void_p(self._base + rank * _ROW_BYTES)
        self._libc.syscall(
            ctypes.c_long(_SYS_FUTEX), address, operation, ctypes.c_uint32(value), wait, None, 0
        )

    def _check_alive(self, name: str) -> None:
        dead = {descriptor for descriptor, _ in self._deaths.poll(0)}
        for rank, descriptor in self._peers.items():
            # One that has published this phase and then ended is no reason to fail.
            if descriptor in dead and self._words[rank * _ROW_BYTES // _WORD_BYTES] < self._phase:
                raise self._error(name, f"rank {rank} of the group has ended", timed_out=False)

    def _fail_timed_out(self, rank: int, name: str) -> None:
        cause = f"rank {rank} of the group did not answer within {self._timeout_s:.0f} s"
        raise self._error(name, cause, timed_out=True)

    def _fail_mismatch(self, rank: int, name: str, own: int, theirs: int) -> None:
        raise self._error(
            name,
            f"rank {self._rank} called {_read_signature(own)}, rank {rank} {_read_signature(theirs)}",
            timed_out=False,
            next_step="make all workers call the same operations in the same order: does the model or the loss "
            "branch on the rank, or on its share of the data?",
        )

    def _error(
        self, name: str, cause: str, *, timed_out: bool, next_step: str = LOOK_FOR_THE_FIRST
    ) -> CollectiveError:
        operation = f"{name} (phase {self._phase})"
        return CollectiveError(self._rank, operation, timed_out=timed_out, cause=cause, next_step=next_step)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


def join_shared_memory(
    rank: int, size: int, local_size: int, timeout_s: float, tell_all: Callable[[Any, str], list[Any]]
) -> tuple[SharedMemory | None, str]:
    """Map one stretch of memory into all workers of a group. A collective call.

    Rank 0 makes the memory and keeps it open; the others open it through /proc. All find the memory's
    secret in it, or none uses it.

    Args:
        local_size: how many workers are on this host, in the group or not.
        tell_all: gives every worker's value, in the order of rank: `(value, what it is)`.

    Returns:
        The memory, or None and the reason why these workers cannot share any.
    """
    offer: dict[str, Any] = {"pid": os.getpid(), "problem": _why_not(size, local_size)}
    descriptor, token = -1, secrets.token_bytes(_TOKEN_BYTES)
    if rank == 0 and not offer["problem"]:
        try:
            descriptor = _create(size, token)
        except OSError as error:
            offer["problem"] = f"rank 0 cannot reserve shared memory: {error.strerror}"
        offer.update(descriptor=descriptor, token=token.hex())
    offers = tell_all(offer, "shared memory")
    problems = [o["problem"] for o in offers]
    memory: mmap.mmap | None = None
    peers: dict[int, int] = {}
    if not any(problems):
        path = Path(f"/proc/{offers[0]['pid']}/fd/{offers[0]['descriptor']}")
        try:
            memory = _map(path, size, bytes.fromhex(offers[0]["token"]))
        except OSError as error:
            problems[rank] = f"rank {rank} cannot map rank 0's memory: {error.strerror}"
        try:
            for peer, theirs in enumerate(offers):
                if peer != rank:
                    peers[peer] = os.pidfd_open(theirs["pid"])
        except OSError as error:
            problems[rank] = f"rank {rank} cannot watch the others' processes: {error.strerror}"
        problems = tell_all(problems[rank], "whether memory is shared")
    if descriptor >= 0:
        os.close(descriptor)
    reason = next((p for p in problems if p), "")
    if memory is not None and not reason:
        return SharedMemory(memory, rank, peers, size, timeout_s), ""
    for peer_descriptor in peers.values():
        os.close(peer_descriptor)
    return None, reason


def _why_not(size: int, local_size: int) -> str:
    if size > local_size:
        return "they are on several hosts"
    for needed in ("memfd_create", "pidfd_open"):
        if not hasattr(os, needed):
            return f"this Python was built without os.{needed}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"shared memory is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return ""


def _create(size: int, token: bytes) -> int:
    descriptor = os.memfd_create("paceline", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(descriptor, 0, _total_bytes(size))
        os.pwrite(descriptor, token, _token_offset(size))
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _map(path: Path, size: int, token: bytes) -> mmap.mmap:
    """Raises OSError where the path is not the memory that rank 0 means: it may be on another host."""
    with open(path, "r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != _total_bytes(size):
            raise OSError(0, "another process has its number here; is it on another host?")
        memory = mmap.mmap(file.fileno(), _total_bytes(size))
    offset = _token_offset(size)
    if not secrets.compare_digest(memory[offset : offset + _TOKEN_BYTES], token):
        raise OSError(0, "another process has its number here; is it on another host?")
    return memory


def _token_offset(size: int) -> int:
    return size * _ROW_BYTES


def _header_bytes(size: int) -> int:
    used = _token_offset(size) + _TOKEN_BYTES
    return -(-used // _PAGE_BYTES) * _PAGE_BYTES


def _total_bytes(size: int) -> int:
    return _header_bytes(size) + 2 * size * SLOT_BYTES


def _add_up(slots: list[torch.Tensor], into: torch.Tensor) -> None:
    torch.add(slots[0], slots[1], out=into)
    for slot in slots[2:]:
        into.add_(slot)


def _signature(kind: str, dtype: torch.dtype, source: int, numel: int) -> int:
    return _KINDS.index(kind) << 56 | _DTYPES.index(dtype) << 48 | source << 32 | numel


def _read_signature(signature: int) -> str:
    kind, dtype = _KINDS[signature >> 56], _DTYPES[signature >> 48 & 0xFF]
    source = f" from rank {signature >> 32 & 0xFFFF}" if kind == "broadcast" else ""
    return f"{kind} of {signature & 0xFFFFFFFF} × {str(dtype).removeprefix('torch.')}{source}"


_DTYPES = (
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
