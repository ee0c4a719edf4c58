"""Collectives through memory that the workers of one host all map.

TCP on loopback costs half a millisecond or more for the smallest message and copies every byte through the
kernel; memory costs what memory costs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch

from paceline.comm import flight_recorder as calls
from paceline.comm.copying import write
from paceline.comm.flight_recorder import Record, pack_call
from paceline.comm.memory_map import DTYPES, MemoryMap, describe
from paceline.comm.phases import SLOT_BYTES, Phases, memory_bytes
from paceline.comm.reductions import SUM, Reduction, reduce_into

__all__ = ["SLOT_BYTES", "SharedMemory", "memory_bytes"]

_ONE_PHASE_BYTES = 32 << 10
"""Up to this size every one of more than two workers adds up everything: half the waits, more reading."""
_AT_ONCE_BYTES = 64 << 10
"""Up to this size it takes less time to copy the own part to and fro than to leave it out."""
_CHAIN_LAG = 2
"""How many pieces a worker passes on before it takes the first of them, where workers share cores."""
_BLOCK_NUMEL = 64
"""Shards and pieces begin at multiples of it: no two workers write into one cache line, and torch's vectors fall on the
same elements as in the whole tensor, which changes the last bit of complex products."""


class SharedMemory:
    """Collectives on CPU tensors among workers `0 … size-1` of one host, through memory of `memory_bytes(size)`.

    Tensors are contiguous, of a type in `DTYPES`, and `what` is for messages. Reductions are taken in the order of
    rank (`Reduction`): identical bits on each worker and in each run.

    Cost per worker, in memory traffic, of summing b bytes: two workers read 3b and write 2b; n of them read about
    (n+1)b up to 32 KiB, 4b up to 1 MiB and 3b above, and write 2b, 3b and 2b. Of reduce-scatter of b bytes: b read and
    written, and 2b/n read for each other; above 1 MiB, of more than two workers, 2b read and b written, and b/n of
    each. Of an all-gather that gives b bytes: b read, b written.
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
        self.phases = Phases(memory, ranks, timeout_s, spins=spins)
        self._rank, self._size = memory.rank, memory.size

    def sum_(self, tensor: torch.Tensor, what: str) -> None:
        """Replace the contiguous `tensor` by the sum over all workers, added in the order of rank.

        Raises:
            CollectiveError: a worker died, did not come in time, or called something else.
        """
        self.all_reduce_(tensor, what, SUM)

    def all_reduce_(self, tensor: torch.Tensor, what: str, reduction: Reduction) -> None:
        """Replace `tensor` by the reduction over all workers. Raises as `sum_`."""
        flat = _flat(tensor)
        call = self._call(calls.ALL_REDUCE, flat, what, reduction=reduction)
        self.phases.run(call, what, self._all_reduce, flat, reduction)

    def reduce_scatter_(self, full: torch.Tensor, what: str) -> None:
        """Replace the own one of `size` equal ranges of `full` (1-D) by its sum over all workers, in the order of rank.

        The other ranges stay as they are.
        """
        flat = _flat(full)
        width = flat.numel() // self._size
        self.reduce_scatter_single(flat[self._rank * width : (self._rank + 1) * width], flat, what, SUM)

    def reduce_scatter_single(
        self, out: torch.Tensor, full: torch.Tensor, what: str, reduction: Reduction
    ) -> None:
        """`reduce_scatter` of equal ranges of `full`, in the order of rank."""
        flat = _flat(out)
        call = self._call(calls.REDUCE_SCATTER, flat, what, reduction=reduction)
        if full.numel() * full.element_size() <= _AT_ONCE_BYTES:
            self.phases.run(call, what, self._reduce_scatter_at_once, flat, _flat(full), reduction)
        else:
            parts = list(full.detach().view(self._size, -1).unbind(0))
            self.phases.run(call, what, self._reduce_scatter, flat, parts, reduction)

    def reduce_scatter(
        self, out: torch.Tensor, parts: Sequence[torch.Tensor], what: str, reduction: Reduction
    ) -> None:
        """Let `out` be the reduction of all workers' `parts[rank]`: as many parts as workers, all like `out`.

        `out` may be the own part. Raises as `sum_`.
        """
        flat = _flat(out)
        call = self._call(calls.REDUCE_SCATTER, flat, what, reduction=reduction)
        self.phases.run(call, what, self._reduce_scatter, flat, [_flat(p) for p in parts], reduction)

    def all_gather_(self, full: torch.Tensor, what: str) -> None:
        """Fill `full` (1-D), of which each worker has filled its own one of `size` equal ranges."""
        flat = _flat(full)
        width = flat.numel() // self._size
        self.all_gather_single(flat, flat[self._rank * width : (self._rank + 1) * width], what)

    def all_gather_single(self, full: torch.Tensor, own: torch.Tensor, what: str) -> None:
        """Fill equal ranges of `full`, in the order of rank, with the workers' `own`."""
        flat = _flat(own)
        call = self._call(calls.ALL_GATHER, flat, what)
        if full.numel() * full.element_size() <= _AT_ONCE_BYTES:
            self.phases.run(call, what, self._all_gather_at_once, full.detach().view(self._size, -1), flat)
        else:
            rows = list(full.detach().view(self._size, -1).unbind(0))
            self.phases.run(call, what, self._all_gather, rows, flat)

    def all_gather(self, outs: Sequence[torch.Tensor], own: torch.Tensor, what: str) -> None:
        """Let `outs[rank]` be that worker's `own`: as many as workers, all of one size. Raises as `sum_`."""
        flat = _flat(own)
        call = self._call(calls.ALL_GATHER, flat, what)
        self.phases.run(call, what, self._all_gather, [_flat(o) for o in outs], flat)

    def broadcast_(self, tensor: torch.Tensor, what: str, source: int) -> None:
        """Replace the contiguous `tensor` by that of rank `source` of the group."""
        flat = _flat(tensor)
        call = self._call(calls.BROADCAST, flat, what, root=source)
        self.phases.run(call, what, self._broadcast, flat, source)

    def reduce_(self, tensor: torch.Tensor, what: str, reduction: Reduction, root: int) -> None:
        """Replace `tensor` by the reduction over all workers, on rank `root` of the group only."""
        flat = _flat(tensor)
        call = self._call(calls.REDUCE, flat, what, root=root, reduction=reduction)
        self.phases.run(call, what, self._reduce, flat, reduction, root)

    def gather(self, outs: Sequence[torch.Tensor], own: torch.Tensor, what: str, root: int) -> None:
        """Let `outs[rank]` be that worker's `own`, on rank `root`; on the others `outs` is empty."""
        flat = _flat(own)
        call = self._call(calls.GATHER, flat, what, root=root)
        self.phases.run(call, what, self._gather, [_flat(o) for o in outs], flat)

    def scatter(self, out: torch.Tensor, parts: Sequence[torch.Tensor], what: str, root: int) -> None:
        """Let `out` be rank `root`'s `parts[rank]`; on the others `parts` is empty."""
        flat = _flat(out)
        call = self._call(calls.SCATTER, flat, what, root=root)
        self.phases.run(call, what, self._scatter, flat, [_flat(p) for p in parts])

    def all_to_all(self, outs: Sequence[torch.Tensor], parts: Sequence[torch.Tensor], what: str) -> None:
        """Let `outs[rank]` be that worker's part for this one: `parts[rank]` goes to it. Sizes may differ.

        Raises:
            CollectiveError: as `sum_`, and where a part and what is to take it differ in size.
        """
        call = self._call(calls.ALL_TO_ALL, _flat(parts[0])[:0], what)
        self.phases.run(call, what, self._all_to_all, [_flat(o) for o in outs], [_flat(p) for p in parts])

    def barrier(self, what: str) -> None:
        """Return when all workers have come here."""
        self.phases.run(pack_call(calls.BARRIER, torch.uint8, 0), what, self.phases.meet)

    def records(self) -> dict[int, list[Record]]:
        """The last 16 operations of each worker, oldest first, by its rank in the world."""
        recorder = self.phases.recorder
        return {name: recorder.records(rank) for rank, name in enumerate(self.phases.ranks)}

    def close(self) -> None:
        """Give back what was taken."""
        self.phases.close()

    def _call(
        self, kind: int, flat: torch.Tensor, what: str, *, root: int = 0, reduction: Reduction = SUM
    ) -> int:
        if flat.dtype not in DTYPES:
            name = f"{calls.KINDS[kind]} of {what}"
            raise self.phases.error(f"{flat.dtype} has no place in shared memory", name=name)
        return pack_call(kind, flat.dtype, flat.numel(), root=root, reduction=reduction)

    def _all_reduce(self, flat: torch.Tensor, reduction: Reduction) -> None:
        phases, rank, size = self.phases, self._rank, self._size
        num_bytes = flat.numel() * flat.element_size()
        if self._pays_in_chain(num_bytes):
            pieces = [piece for (piece,) in _pieces([flat])]
            self._reduce_in_chain(pieces, reduction, lambda index, total: pieces[index].copy_(total))
            return
        if size > 2 and num_bytes > _ONE_PHASE_BYTES:
            self._all_reduce_in_shards(flat, reduction)
            return
        for (piece,) in _pieces([flat]):
            slots = phases.turn(piece.dtype, piece.numel())
            write(slots[rank], piece)
            phases.meet()
            # With two workers the own tensor need not be read back from memory; rank order all the same.
            parts = slots if size > 2 else [*slots[:rank], piece, *slots[rank + 1 :]]
            reduce_into(piece, parts, reduction)

    def _all_reduce_in_shards(self, flat: torch.Tensor, reduction: Reduction) -> None:
        """Each worker reduces one shard of a piece, in rank 0's slot; then all copy the whole from there."""
        phases, rank, size = self.phases, self._rank, self._size
        for (piece,) in _pieces([flat]):
            numel = piece.numel()
            slots = phases.turn(piece.dtype, numel)
            write(slots[rank], piece)
            phases.meet()
            begin, end = _bound(numel, rank, size), _bound(numel, rank + 1, size)
            shards = [slot[begin:end] for slot in slots]
            reduce_into(shards[0], shards, reduction)
            phases.meet()
            piece.copy_(slots[0])

    def _pays_in_chain(self, num_bytes: int) -> bool:
        """Whether so much is reduced faster from worker to worker than in steps that all make together."""
        least = 2 * self._size if self.phases.spins else 1
        return self._size > 2 and num_bytes > least * SLOT_BYTES

    def _reduce_in_chain(
        self,
        pieces: list[torch.Tensor],
        reduction: Reduction,
        take: Callable[[int, torch.Tensor], object],
    ) -> None:
        """Each worker in turn adds its own to what those before it made of a piece; then all `take(index, total)`.

        In one's own slot, a piece would be written by each worker, and read once more by who adds all up: here each
        reads what the one before it has just written, and nobody else does. Where workers share cores few pieces are
        under way at a time, and stay in the cache; where each has its own, enough that none has to wait.
        """
        phases, rank, last = self.phases, self._rank, self._size - 1
        lag = self._size if phases.spins else _CHAIN_LAG
        # Nobody reads the slots any more; then nobody writes them before all have taken.
        phases.meet()
        places = phases.pieces_of(pieces[0].dtype, SLOT_BYTES // pieces[0].element_size())[: 2 * lag]
        totals = [places[i % len(places)][: piece.numel()] for i, piece in enumerate(pieces)]

        def work(index: int) -> None:
            total, piece = totals[index], pieces[index]
            if rank == 0:
                write(total, piece)
            else:
                reduction.combine(total, piece, out=total)
            if rank == last and reduction.divides:
                total.div_(self._size)

        phases.pass_on(len(pieces), len(places), lag, work, lambda index: take(index, totals[index]))
        phases.meet()

    def _reduce_scatter(self, out: torch.Tensor, parts: list[torch.Tensor], reduction: Reduction) -> None:
        """The slots of a turn as rows: each worker writes what the others need of it, one part after the other."""
        phases, rank, size = self.phases, self._rank, self._size
        if self._pays_in_chain(size * out.numel() * out.element_size()):
            pieces, places = _by_turns(out, parts)

            def take(index: int, total: torch.Tensor) -> None:
                owner, place = places[index]
                if owner == rank:
                    place.copy_(total)

            self._reduce_in_chain(pieces, reduction, take)
            return
        for piece, *rows in _pieces([out, *parts], size):
            width = piece.numel()
            slots = phases.turn(piece.dtype, width * size)
            for other, row in enumerate(rows):
                if other != rank:
                    write(slots[rank][other * width : (other + 1) * width], row)
            phases.meet()
            received = [slot[rank * width : (rank + 1) * width] for slot in slots]
            received[rank] = rows[rank]
            # `piece` may be the own row: in any place but the first two that would be read after it was written.
            if rank > 1 and piece.data_ptr() == rows[rank].data_ptr():
                received[rank] = slots[rank][rank * width : (rank + 1) * width]
                write(received[rank], rows[rank])
            reduce_into(piece, received, reduction)

    def _reduce_scatter_at_once(self, out: torch.Tensor, full: torch.Tensor, reduction: Reduction) -> None:
        phases, width = self.phases, out.numel()
        slots = phases.turn(full.dtype, full.numel())
        write(slots[self._rank], full)
        phases.meet()
        begin = self._rank * width
        reduce_into(out, [slot[begin : begin + width] for slot in slots], reduction)

    def _all_gather_at_once(self, table: torch.Tensor, own: torch.Tensor) -> None:
        slots, received = self.phases.turn_of_rows(own.dtype, own.numel())
        write(slots[self._rank], own)
        self.phases.meet()
        table.copy_(received)

    def _all_gather(self, outs: list[torch.Tensor], own: torch.Tensor) -> None:
        phases, rank = self.phases, self._rank
        for piece, *rows in _pieces([own, *outs]):
            slots = phases.turn(piece.dtype, piece.numel())
            write(slots[rank], piece)
            phases.meet()
            for other, row in enumerate(rows):
                # What is here already need not be copied onto itself.
                if other != rank:
                    row.copy_(slots[other])
                elif row.data_ptr() != piece.data_ptr():
                    row.copy_(piece)

    def _broadcast(self, flat: torch.Tensor, source: int) -> None:
        phases = self.phases
        for (piece,) in _pieces([flat]):
            slot = phases.turn(piece.dtype, piece.numel())[source]
            if self._rank == source:
                write(slot, piece)
            phases.meet()
            if self._rank != source:
                piece.copy_(slot)

    def _reduce(self, flat: torch.Tensor, reduction: Reduction, root: int) -> None:
        phases = self.phases
        for (piece,) in _pieces([flat]):
            slots = phases.turn(piece.dtype, piece.numel())
            write(slots[self._rank], piece)
            phases.meet()
            if self._rank == root:
                reduce_into(piece, slots, reduction)

    def _gather(self, outs: list[torch.Tensor], own: torch.Tensor) -> None:
        phases = self.phases
        for piece, *rows in _pieces([own, *outs]):
            slots = phases.turn(piece.dtype, piece.numel())
            write(slots[self._rank], piece)
            phases.meet()
            for row, slot in zip(rows, slots if rows else (), strict=True):
                row.copy_(slot)

    def _scatter(self, out: torch.Tensor, parts: list[torch.Tensor]) -> None:
        """The root writes into each worker's slot what that one is to have."""
        phases = self.phases
        for piece, *rows in _pieces([out, *parts]):
            slots = phases.turn(piece.dtype, piece.numel())
            for slot, row in zip(slots if rows else (), rows, strict=True):
                write(slot, row)
            phases.meet()
            piece.copy_(slots[self._rank])

    def _all_to_all(self, outs: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        phases, rank, size = self.phases, self._rank, self._size
        most = self._agree_on_sizes(outs, parts)
        width = SLOT_BYTES // parts[0].element_size() // size
        for begin in range(0, most, width):
            slots = phases.turn(parts[0].dtype, width * size)
            for other, part in enumerate(parts):
                row = part[begin : begin + width]
                write(slots[rank][other * width : other * width + row.numel()], row)
            phases.meet()
            for slot, out in zip(slots, outs, strict=True):
                row = out[begin : begin + width]
                row.copy_(slot[rank * width : rank * width + row.numel()])

    def _agree_on_sizes(self, outs: list[torch.Tensor], parts: list[torch.Tensor]) -> int:
        """The size of the largest part; an error on all workers if any part does not fit."""
        phases, size = self.phases, self._size
        slots = phases.turn(torch.int64, 2 * size)
        slots[self._rank].copy_(torch.tensor([t.numel() for t in (*parts, *outs)]))
        phases.meet()
        table: list[list[int]] = [slot.tolist() for slot in slots]
        for sender in range(size):
            for receiver in range(size):
                sent, taken = table[sender][receiver], table[receiver][size + sender]
                if sent != taken:
                    dtype = parts[0].dtype
                    raise phases.error(
                        f"rank {phases.ranks[sender]} sends {describe(dtype, sent)} to rank "
                        f"{phases.ranks[receiver]}, which receives {describe(dtype, taken)}",
                        next_step="make the split sizes of both sides agree",
                    )
        return max(max(row[:size]) for row in table)


def _by_turns(
    out: torch.Tensor, parts: list[torch.Tensor]
) -> tuple[list[torch.Tensor], list[tuple[int, torch.Tensor]]]:
    """The pieces of all parts, the first of each, then the second, …; of each its part, and where in `out` it goes."""
    found = [(row, owner, place) for place, *rows in _pieces([out, *parts]) for owner, row in enumerate(rows)]
    return [row for row, _, _ in found], [(owner, place) for _, owner, place in found]


def _flat(tensor: torch.Tensor) -> torch.Tensor:
    flat = tensor if tensor.dim() == 1 else tensor.view(-1)
    return flat.detach() if flat.requires_grad else flat


def _bound(numel: int, rank: int, size: int) -> int:
    """Where the shard of `rank` begins."""
    return min(numel, -(-numel // (size * _BLOCK_NUMEL)) * _BLOCK_NUMEL * rank)


def _pieces(tensors: list[torch.Tensor], num_rows: int = 1) -> Iterator[list[torch.Tensor]]:
    """The same ranges of 1-D tensors of one size, one piece after the other; a single empty piece of empty ones.

    Args:
        num_rows: how many pieces have to fit into one slot.
    """
    numel = tensors[0].numel()
    width = SLOT_BYTES // tensors[0].element_size() // num_rows // _BLOCK_NUMEL * _BLOCK_NUMEL
    if numel <= width:
        yield tensors
        return
    for begin in range(0, numel, width):
        yield [tensor[begin : begin + width] for tensor in tensors]
