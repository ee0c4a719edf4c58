"""Memory that the workers of one host all map: making it, finding it, waiting on a number in it.

It has no name in any file system and its pages are reserved before they are used: whatever dies, nothing stays
behind, and memory that is not there is found missing by an error, not by a crash later.
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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

WORD_BYTES = 8
ROW_BYTES = 128
"""What one worker counts in: two cache lines, as processors fetch them in pairs."""
DATA_BEGIN = 4096
"""Bytes before the data: the memory's secret, and room up to a whole page."""
SPIN_S = 200e-6
"""How long a wait looks before it sleeps, where every worker has a core of its own. Between two looks it lets
others run: two workers may be on one core all the same, and one that only looked would keep the other from coming."""
SLICE_S = 0.05
"""How often a sleeping worker looks whether the others still live."""

DTYPES = (
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
    torch.uint16,
    torch.uint32,
    torch.uint64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e4m3fnuz,
    torch.float8_e5m2fnuz,
)
"""The types that travel through memory, by number. There are at most 32 (`flight_recorder`)."""

_TOKEN_BYTES = 16
_SYS_FUTEX, _FUTEX_WAIT, _FUTEX_WAKE = 202, 0, 1


def describe(dtype: torch.dtype, numel: int) -> str:
    """`8 × float32`."""
    return f"{numel} × {str(dtype).removeprefix('torch.')}"


class Counters:
    """The numbers of 8 bytes in a memory. One worker counts each of them up; others wait for it.

    Linux on x86-64: the order in which one worker's writes become visible to another is what that processor
    guarantees, so that a count, written last, says that what was written before it may be read.
    """

    def __init__(self, memory: mmap.mmap) -> None:
        self.words = memoryview(memory).cast("q")
        self._base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        self._syscall = ctypes.CDLL(None).syscall
        # Said once, instead of at every call: conversions take longer than the call itself.
        self._syscall.argtypes = _FUTEX_ARGUMENTS
        self._slice = ctypes.byref(_Timespec(int(SLICE_S), int(SLICE_S % 1 * 1e9)))

    def wake(self, word: int) -> None:
        """Wake everyone who sleeps on a count."""
        self._syscall(_SYS_FUTEX, self._base + word * WORD_BYTES, _FUTEX_WAKE, 0x7FFFFFFF, None, None, 0)

    def sleep(self, word: int, count: int) -> None:
        """Sleep until `wake`, for `SLICE_S` at most, unless the count is no longer `count`.

        An interruption just returns. The kernel looks at the count after a full memory barrier, so that what
        this worker wrote before can be seen by whoever changes the count afterwards.
        """
        address = self._base + word * WORD_BYTES
        self._syscall(_SYS_FUTEX, address, _FUTEX_WAIT, count & 0xFFFFFFFF, self._slice, None, 0)

    def publish(self, word: int, value: int) -> None:
        """Set a count, and wake who waits for it."""
        self.words[word] = value
        self.wake(word)

    def wait(self, word: int, least: int, spin_s: float, check: Callable[[], None]) -> None:
        """Return when the count is at least `least`; call `check` about every `SLICE_S`, which may raise."""
        words = self.words
        if words[word] >= least:
            return
        begin_s = time.perf_counter()
        while words[word] < least and time.perf_counter() - begin_s < spin_s:
            os.sched_yield()
        while (count := words[word]) < least:
            self.sleep(word, count)
            if words[word] < least:
                check()


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


_FUTEX_ARGUMENTS = (
    ctypes.c_long,
    ctypes.c_void_p,
    ctypes.c_int,
    ctypes.c_uint32,
    ctypes.c_void_p,
    ctypes.c_void_p,
    ctypes.c_int,
)


class MemoryMap:
    """What `join_memory` mapped, and a watch on the processes that share it."""

    def __init__(
        self,
        rank: int,
        size: int,
        memories: dict[int, mmap.mmap],
        peers: dict[int, int],
        pids: list[int],
        descriptor: int,
        reserved_bytes: int,
    ) -> None:
        self.rank, self.size = rank, size
        self.pids = pids
        """Of each rank."""
        self.memories = memories
        """Of each rank that made one: data from `DATA_BEGIN` on."""
        self._peers = peers
        """Of each other worker, a descriptor that becomes readable when it dies."""
        self._descriptor = descriptor
        self._reserved_bytes = reserved_bytes
        self._deaths = select.poll()
        for peer in peers.values():
            self._deaths.register(peer, select.POLLIN)

    def ended(self) -> set[int]:
        """The ranks whose processes have ended."""
        dead = {descriptor for descriptor, _ in self._deaths.poll(0)}
        return {rank for rank, descriptor in self._peers.items() if descriptor in dead}

    def tensor(self, rank: int, offset_bytes: int, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """A 1-D tensor in the data of the memory that `rank` made. It keeps the memory mapped."""
        if numel == 0:
            return torch.empty(0, dtype=dtype)
        begin = DATA_BEGIN + offset_bytes
        return torch.frombuffer(self.memories[rank], dtype=dtype, count=numel, offset=begin)

    def why_silent(self, rank: int) -> str:
        """What the system knows about a worker that does not answer: `: …`, or nothing."""
        try:
            stat = Path(f"/proc/{self.pids[rank]}/stat").read_text()
        except OSError:
            return ""
        # The name before the state is in parentheses, and may contain anything.
        state = stat.rpartition(")")[2].split()[0]
        if state in "Tt":
            return f": its process (PID {self.pids[rank]}) is stopped (state {state}); `kill -CONT` would continue it"
        return ""

    def reserve(self, end_bytes: int, at_least_bytes: int) -> None:
        """See that the own memory has pages up to `end_bytes`; take `at_least_bytes` more if it has not.

        Raises:
            OSError: there is no more memory.
        """
        if end_bytes > self._reserved_bytes:
            more = max(end_bytes - self._reserved_bytes, at_least_bytes)
            os.posix_fallocate(self._descriptor, self._reserved_bytes, more)
            self._reserved_bytes += more

    def close(self) -> None:
        """Stop watching the others. The memory itself goes with the last process that maps it."""
        for descriptor in self._peers.values():
            os.close(descriptor)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._peers, self._descriptor = {}, -1


def join_memory(
    rank: int,
    size: int,
    local_size: int,
    makers: Sequence[int],
    data_bytes: int,
    tell_all: Callable[[Any, str], list[Any]],
    most_bytes: int = 0,
) -> tuple[MemoryMap | None, str]:
    """Map one stretch of memory from each of `makers` into all workers of a group. A collective call.

    The makers keep their memory open; the others open it through /proc. All find each memory's secret in
    it, or none uses any.

    Args:
        local_size: how many workers are on this host, in the group or not.
        data_bytes: size of each stretch.
        tell_all: gives every worker's value, in the order of rank: `(value, what it is)`.
        most_bytes: up to this size its maker may let a stretch grow (`MemoryMap.reserve`). Pages that are
            not reserved cost nothing.

    Returns:
        The memory, or None and the reason why these workers cannot share any.
    """
    reserved_bytes = DATA_BEGIN + data_bytes
    mapped_bytes = max(reserved_bytes, most_bytes)
    offer: dict[str, Any] = {"pid": os.getpid(), "problem": _why_not(size, local_size)}
    descriptor, token = -1, secrets.token_bytes(_TOKEN_BYTES)
    if rank in makers and not offer["problem"]:
        try:
            descriptor = _create(reserved_bytes, mapped_bytes, token)
        except OSError as error:
            offer["problem"] = f"rank {rank} cannot reserve shared memory: {error.strerror}"
        offer.update(descriptor=descriptor, token=token.hex())
    offers = tell_all(offer, "shared memory")
    problems = [o["problem"] for o in offers]
    memories: dict[int, mmap.mmap] = {}
    peers: dict[int, int] = {}
    if not any(problems):
        problem = _open_all(rank, offers, makers, mapped_bytes, memories, peers)
        problems = tell_all(problem, "whether memory is shared")
    if descriptor >= 0 and mapped_bytes == reserved_bytes:
        os.close(descriptor)
        descriptor = -1
    pids = [o["pid"] for o in offers]
    memory = MemoryMap(rank, size, memories, peers, pids, descriptor, reserved_bytes)
    reason = next((p for p in problems if p), "")
    if not reason:
        return memory, ""
    memory.close()
    return None, reason


def _open_all(
    rank: int,
    offers: list[dict[str, Any]],
    makers: Sequence[int],
    mapped_bytes: int,
    memories: dict[int, mmap.mmap],
    peers: dict[int, int],
) -> str:
    """Fill `memories` and `peers`; the reason, if that cannot be done."""
    for maker in makers:
        theirs = offers[maker]
        path = Path(f"/proc/{theirs['pid']}/fd/{theirs['descriptor']}")
        try:
            memories[maker] = _map(path, mapped_bytes, bytes.fromhex(theirs["token"]))
        except OSError as error:
            return f"rank {rank} cannot map rank {maker}'s memory: {error.strerror}"
    try:
        for peer, theirs in enumerate(offers):
            if peer != rank:
                peers[peer] = os.pidfd_open(theirs["pid"])
    except OSError as error:
        return f"rank {rank} cannot watch the others' processes: {error.strerror}"
    return ""


def _why_not(size: int, local_size: int) -> str:
    if size > local_size:
        return "they are on several hosts"
    for needed in ("memfd_create", "pidfd_open"):
        if not hasattr(os, needed):
            return f"this Python was built without os.{needed}"
    if sys.platform != "linux" or platform.machine() != "x86_64":
        return f"shared memory is for Linux on x86-64, and this is {sys.platform} on {platform.machine()}"
    return ""


def _create(reserved_bytes: int, mapped_bytes: int, token: bytes) -> int:
    descriptor = os.memfd_create("paceline", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, mapped_bytes)
        os.posix_fallocate(descriptor, 0, reserved_bytes)
        os.pwrite(descriptor, token, 0)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def _map(path: Path, mapped_bytes: int, token: bytes) -> mmap.mmap:
    """Raises OSError where the path is not the memory that is meant: it may be on another host."""
    with open(path, "r+b", buffering=0) as file:
        if os.fstat(file.fileno()).st_size != mapped_bytes:
            raise OSError(0, "another process has its number here; is it on another host?")
        memory = mmap.mmap(file.fileno(), mapped_bytes)
    if not secrets.compare_digest(memory[:_TOKEN_BYTES], token):
        raise OSError(0, "another process has its number here; is it on another host?")
    return memory
