"""Collectives through memory that the workers of one host all map.

TCP on loopback costs half a millisecond or more for the smallest message and copies every byte through the
kernel; memory costs what memory costs.
"""

from __future__ import annotations

import functools
import time

import torch

from paceline.comm.memory_map import (
    DATA_BEGIN,
    DTYPES,
    ROW_BYTES,
    SPIN_S,
    WORD_BYTES,
    Counters,
    MemoryMap,
    describe,
)
from paceline.errors import LOOK_FOR_THE_FIRST, CollectiveError

SLOT_BYTES = 1 << 20
"""Larger tensors travel in pieces of this size, so that a piece is still in the cache when it is read."""
_ONE_PHASE_BYTES = 32 << 10
"""Up to this size every one of more than two workers adds up everything: half the waits, more reading."""
_PAGE_BYTES = 4096
_SIGNATURES = 1
"""A row's words: the count of phases, and the signatures of two phases."""
_KINDS = ("all-reduce", "all-gather", "broadcast", "reduce-scatter")


def memory_bytes(size: int) -> int:
    """What a group of `size` workers needs: one header, and two slots of 1 MiB for each worker."""
    return _header_bytes(size) + 2 * size * SLOT_BYTES


class SharedMemory:
    """Collectives on CPU tensors among workers `0 … size-1` of one host, through memory of `memory_bytes(size)`.

    Every operation is a row of phases. In a phase a worker writes its slot, publishes the phase's number,
    waits until all have published it, and reads the others' slots. Each worker has two slots, used in
    turn: who has published phase k+1 has read what it wanted of phase k, so that in phase k+2 the slot of
    phase k may be written again. One wait per phase, and no lock.

    Cost per worker, in memory traffic, of summing b bytes: two workers read 3b and write 2b; n of them read
    about (n+1)b up to 32 KiB and 5b above, and write 2b and 4b. Of reduce-scatter of b bytes: two workers read
    1.5b and write b, n of them read 2b and write (1 + 1/n)b. Of an all-gather that gives b bytes: b read, b written.
    A phase takes about 10 µs where the others are already there, and 30 to 100 µs with the wait for
    them (docs/log.md).

    After an operation has failed all later ones fail: the workers no longer agree on what comes next.
    """

    def __init__(self, memory: MemoryMap, ranks: tuple[int, ...], timeout_s: float, *, spins: bool):
        """
        Args:
            memory: what rank 0 of the group made.
            ranks: the members' ranks in the world, for messages.
            spins: whether every worker has a core of its own, so that looking is better than sleeping.
        """
        self._memory, self._rank, self._size = memory, memory.rank, memory.size
        self._ranks, self._timeout_s = ranks, timeout_s
        self._counters = Counters(memory.memories[0])
        self._words = self._counters.words
        self._spin_s = SPIN_S if spins else 0.0
        self._phase = 0
        self._slots: dict[torch.dtype, list[list[torch.Tensor]]] = {}
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

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> None:
        """Replace the own one of `size` equal ranges of `full` (1-D) by its sum over all workers, in the order of rank.

        The other ranges stay as they are.
        """
        rows = full.view(self._size, -1)
        own = rows[self._rank]
        # Of two workers each needs half of the other's only; then the order of addition makes no difference.
        rows_sent = 1 if self._size == 2 else self._size
        width = SLOT_BYTES // full.element_size() // rows_sent
        for begin in range(0, own.numel(), width):
            piece = own[begin : begin + width]
            if self._size == 2:
                outgoing = rows[1 - self._rank, begin : begin + width]
                piece.add_(self._exchange(outgoing, "reduce-scatter", what)[1 - self._rank])
            else:
                slots = self._exchange(rows[:, begin : begin + width], "reduce-scatter", what)
                _add_up([slot.view(self._size, -1)[self._rank] for slot in slots], piece)

    def all_gather_(self, full: torch.Tensor, what: str) -> None:
        """Fill `full` (1-D), of which each worker has filled its own one of `size` equal ranges."""
        rows = full.view(self._size, -1)
        slot_numel = SLOT_BYTES // full.element_size()
        for begin in range(0, rows.shape[1], slot_numel):
            slots = self._exchange(rows[self._rank, begin : begin + slot_numel], "all-gather", what)
            for rank, slot in enumerate(slots):
                if rank != self._rank:
                    rows[rank, begin : begin + slot_numel].copy_(slot)

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int) -> None:
        """Replace the contiguous `tensor` by that of rank `source` of the group."""
        flat = tensor.view(-1)
        slot_numel = SLOT_BYTES // tensor.element_size()
        for begin in range(0, flat.numel(), slot_numel):
            piece = flat[begin : begin + slot_numel]
            slots = self._exchange(piece, "broadcast", what, source=source)
            if self._rank != source:
                piece.copy_(slots[source])

    def close(self) -> None:
        """Give back what was taken."""
        self._memory.close()

    def _exchange(
        self,
        piece: torch.Tensor,
        kind: str,
        what: str,
        lengths: list[int] | None = None,
        *,
        source: int | None = None,
    ) -> list[torch.Tensor]:
        """One phase: everyone's slot (1-D), to be read before the next.

        Args:
            piece: what goes into the own slot; of any shape, and need not be contiguous.
            lengths: elements in each slot; None: as many as in `piece`.
            source: the only one that writes; None: all do.
        """
        name = f"{kind} of {what}"
        if self._failure:
            raise self._error(name, f"an earlier operation failed: {self._failure}", timed_out=False)
        if piece.dtype not in DTYPES:
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
            self._typed_slots(piece.dtype)[parity][self._rank][: piece.numel()].view(piece.shape).copy_(piece)
        # What all must agree on: in a phase of shards, whose lengths differ, that of rank 0.
        numel = piece.numel() if lengths is None else lengths[0]
        signature = _signature(kind, piece.dtype, source or 0, numel)
        self._words[_row(self._rank) + _SIGNATURES + parity] = signature
        self._counters.publish(_row(self._rank), self._phase)
        self._wait(name)
        for rank in range(self._size):
            theirs = self._words[_row(rank) + _SIGNATURES + parity]
            if theirs != signature:
                self._fail_mismatch(rank, name, signature, theirs)

    def _typed_slots(self, dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """`[parity][rank]`: the slots as 1-D tensors of `dtype`."""
        if dtype not in self._slots:
            offset = DATA_BEGIN + _header_bytes(self._size)
            flat = torch.frombuffer(self._memory.memories[0], dtype=dtype, offset=offset)
            table = flat.view(2, self._size, -1)
            self._slots[dtype] = [list(row.unbind(0)) for row in table.unbind(0)]
        return self._slots[dtype]

    def _wait(self, name: str) -> None:
        """Return when all workers have published the present phase."""
        begin_s = time.perf_counter()
        for rank in range(self._size):
            if rank != self._rank:
                check = functools.partial(self._check, rank, name, begin_s)
                self._counters.wait(_row(rank), self._phase, self._spin_s, check)

    def _check(self, missing: int, name: str, begin_s: float) -> None:
        for rank in sorted(self._memory.ended()):
            # One that has published this phase and then ended is no reason to fail.
            if self._words[_row(rank)] < self._phase:
                raise self._error(name, f"rank {self._ranks[rank]} has ended", timed_out=False)
        if time.perf_counter() > begin_s + self._timeout_s:
            cause = f"rank {self._ranks[missing]} did not answer within {self._timeout_s:.0f} s"
            raise self._error(name, cause, timed_out=True)

    def _fail_mismatch(self, rank: int, name: str, own: int, theirs: int) -> None:
        raise self._error(
            name,
            f"rank {self._ranks[self._rank]} called {self._read_signature(own)}, "
            f"rank {self._ranks[rank]} {self._read_signature(theirs)}",
            timed_out=False,
            next_step="make all workers call the same operations in the same order: does the model or the loss "
            "branch on the rank, or on its share of the data?",
        )

    def _read_signature(self, signature: int) -> str:
        kind, dtype = _KINDS[signature >> 56], DTYPES[signature >> 48 & 0xFF]
        source = f" from rank {self._ranks[signature >> 32 & 0xFFFF]}" if kind == "broadcast" else ""
        return f"{kind} of {describe(dtype, signature & 0xFFFFFFFF)}{source}"

    def _error(
        self, name: str, cause: str, *, timed_out: bool, next_step: str = LOOK_FOR_THE_FIRST
    ) -> CollectiveError:
        operation = f"{name} (phase {self._phase})"
        return CollectiveError(
            self._ranks[self._rank], operation, timed_out=timed_out, cause=cause, next_step=next_step
        )


def _row(rank: int) -> int:
    """The first of a worker's words."""
    return (DATA_BEGIN + rank * ROW_BYTES) // WORD_BYTES


def _header_bytes(size: int) -> int:
    return -(-size * ROW_BYTES // _PAGE_BYTES) * _PAGE_BYTES


def _add_up(slots: list[torch.Tensor], into: torch.Tensor) -> None:
    torch.add(slots[0], slots[1], out=into)
    for slot in slots[2:]:
        into.add_(slot)


def _signature(kind: str, dtype: torch.dtype, source: int, numel: int) -> int:
    return _KINDS.index(kind) << 56 | DTYPES.index(dtype) << 48 | source << 32 | numel
