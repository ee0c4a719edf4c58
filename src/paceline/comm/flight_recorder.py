"""What each worker of a group did last, in memory that all of them can read when something fails.

A call is one number of 63 bits: its kind, reduction, type of number, root and number of elements. Workers compare
these numbers before they touch each other's data, and keep their last 16 as a record: half a microsecond for each.
"""

from __future__ import annotations

import dataclasses
import time

import torch

from paceline.comm.memory_map import DTYPES, WORD_BYTES, describe
from paceline.comm.reductions import REDUCTIONS, SUM, Reduction

KINDS = (
    "all-reduce",
    "all-gather",
    "broadcast",
    "reduce-scatter",
    "reduce",
    "gather",
    "scatter",
    "all-to-all",
    "barrier",
    "send",
    "receive",
)
(
    ALL_REDUCE,
    ALL_GATHER,
    BROADCAST,
    REDUCE_SCATTER,
    REDUCE,
    GATHER,
    SCATTER,
    ALL_TO_ALL,
    BARRIER,
    SEND,
    RECEIVE,
) = range(len(KINDS))
_ROOTED = {
    "broadcast": "from",
    "scatter": "from",
    "receive": "from",
    "gather": "to",
    "reduce": "to",
    "send": "to",
}

NUM_RECORDS = 16
_RECORD_WORDS = 4
"""Number of the operation, call, and when it was entered and left (0: not yet), in ns of the monotonic clock."""
RECORDER_BYTES = NUM_RECORDS * _RECORD_WORDS * WORD_BYTES

_NUMEL_BITS, _ROOT_BITS, _DTYPE_BITS, _REDUCTION_BITS = 38, 12, 5, 4
_ROOT_AT = _NUMEL_BITS
_DTYPE_AT = _ROOT_AT + _ROOT_BITS
_REDUCTION_AT = _DTYPE_AT + _DTYPE_BITS
_KIND_AT = _REDUCTION_AT + _REDUCTION_BITS
_DTYPE_FIELDS = {dtype: number << _DTYPE_AT for number, dtype in enumerate(DTYPES)}
MOST_RANKS = 1 << _ROOT_BITS
ANY_SOURCE = MOST_RANKS - 1
"""The root of a receive that takes what comes from anyone."""
_OWN_RECORDS, _OTHERS_RECORDS = 3, 1
"""How many of a worker's records an error tells."""


def pack_call(kind: int, dtype: torch.dtype, numel: int, *, root: int = 0, reduction: Reduction = SUM) -> int:
    """A call as a number.

    Args:
        dtype: one of `DTYPES`.
        numel: of the whole call, however many pieces it takes.
    """
    number = kind << _KIND_AT | reduction.number << _REDUCTION_AT | root << _ROOT_AT
    return number | _DTYPE_FIELDS[dtype] | numel


def describe_call(call: int, ranks: tuple[int, ...]) -> str:
    """`reduce (maximum) of 8 × float32 to rank 0`; a rank is that in the world."""
    kind = KINDS[call >> _KIND_AT]
    if kind == "barrier":
        return kind
    reduction = REDUCTIONS[_field(call, _REDUCTION_AT, _REDUCTION_BITS)]
    text = kind if reduction is SUM else f"{kind} ({reduction.name})"
    dtype = DTYPES[_field(call, _DTYPE_AT, _DTYPE_BITS)]
    text += f" of {describe(dtype, _field(call, 0, _NUMEL_BITS))}"
    if kind in _ROOTED:
        root = _field(call, _ROOT_AT, _ROOT_BITS)
        text += f" {_ROOTED[kind]} {'any rank' if root == ANY_SOURCE else f'rank {ranks[root]}'}"
    return text


def _field(call: int, at: int, num_bits: int) -> int:
    return call >> at & (1 << num_bits) - 1


@dataclasses.dataclass(frozen=True)
class Record:
    """One operation of one worker."""

    number: int
    """Of the operation, as that worker counts its own from 1."""
    call: str
    entered_s: float
    """Time of the host's monotonic clock, the same for all of its processes."""
    left_s: float | None
    """None: it is still inside, or failed there."""

    def __str__(self) -> str:
        if self.left_s is None:
            ago_s = time.monotonic() - self.entered_s
            return f"operation {self.number}, {self.call}: entered {ago_s:.3f} s ago, not left"
        return f"operation {self.number}, {self.call}: done in {(self.left_s - self.entered_s) * 1e6:.0f} µs"


class FlightRecorder:
    """A ring of the last 16 operations for each worker. Each writes its own and may read all.

    Cost: 5 words written for each operation, about 0.5 µs.
    """

    def __init__(self, words: memoryview, rows: list[int], ranks: tuple[int, ...], rank: int) -> None:
        """
        Args:
            words: of the memory.
            rows: the word at which each worker's ring begins (`RECORDER_BYTES` each), all zero when the group starts.
            ranks: the members' ranks in the world, for messages.
        """
        self._words, self._rows, self._ranks, self._rank = words, rows, ranks, rank
        self._own = rows[rank]
        self.num_entered = 0
        """Operations that this worker began."""

    def enter(self, call: int) -> int:
        """An operation begins; returns the word for `leave`."""
        words = self._words
        at = self._own + self.num_entered % NUM_RECORDS * _RECORD_WORDS
        self.num_entered += 1
        words[at + 3] = 0
        words[at + 2] = time.monotonic_ns()
        words[at + 1] = call
        words[at] = self.num_entered
        return at

    def leave(self, at: int) -> None:
        """The operation is done."""
        self._words[at + 3] = time.monotonic_ns()

    def records(self, rank: int) -> list[Record]:
        """The last operations of one worker, oldest first. What it writes at the moment may be torn."""
        rows = []
        for number in range(NUM_RECORDS):
            at = self._rows[rank] + number * _RECORD_WORDS
            rows.append(self._words[at : at + _RECORD_WORDS].tolist())
        return [
            Record(number, describe_call(call, self._ranks), entered * 1e-9, left * 1e-9 if left else None)
            for number, call, entered, left in sorted(rows)
            if number
        ]

    def report(self) -> str:
        """What each worker did last: three records of the own, one of each other."""
        lines = ["What each rank did last:"]
        for rank, name in enumerate(self._ranks):
            records = self.records(rank)[-(_OWN_RECORDS if rank == self._rank else _OTHERS_RECORDS) :]
            lines += [f"  rank {name}: {record}" for record in records] or [f"  rank {name}: nothing"]
        return "\n".join(lines)
