"""Workers of one host in step: everyone writes, all meet, everyone reads. What collectives in memory are made of."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch._C import _AutoDispatchBelowAutograd

from paceline.comm.flight_recorder import RECORDER_BYTES, FlightRecorder, describe_call
from paceline.comm.memory_map import DATA_BEGIN, ROW_BYTES, SPIN_S, WORD_BYTES, Counters, MemoryMap
from paceline.errors import LOOK_FOR_THE_FIRST, CollectiveError

SLOT_BYTES = 1 << 20
"""Larger tensors travel in pieces of this size, so that a piece is still in the cache when it is read."""
_NUM_TURNS = 2
_PAGE_BYTES = 4096
_WORKER_BYTES = ROW_BYTES + RECORDER_BYTES
_WORKER_WORDS = _WORKER_BYTES // WORD_BYTES
_ROWS_AT = DATA_BEGIN // WORD_BYTES
_GATE = 32
"""The word of the last phase that all have reached; in the page of the memory's secret, in a line of its own."""
_CALLS, _ASLEEP, _GAVE_UP, _PASSED, _TAKEN = 1, 3, 4, 5, 6
"""A worker's words: the phase that it has reached, its calls of two phases, whether it sleeps, where it failed, and
the pieces that it has passed on and taken (`pass_on`)."""
_SHARED_SPIN_S = 100e-6
"""How long a wait looks before it sleeps, where workers share cores."""
_MOST_VIEWS = 512


def memory_bytes(size: int) -> int:
    """What a group of `size` workers needs: a header, and two slots of 1 MiB for each worker."""
    return _header_bytes(size) + _NUM_TURNS * size * SLOT_BYTES


def _header_bytes(size: int) -> int:
    return -(-size * _WORKER_BYTES // _PAGE_BYTES) * _PAGE_BYTES


class Phases:
    """The steps of operations among workers `0 … size-1` of one host, in memory of `memory_bytes(size)`.

    An operation is a row of pieces. For a piece each worker takes its `turn` at the slots, writes, and meets the
    others once or more (`meet`): what was written before is read after. There are two turns of slots, used one after
    the other: who has come to a meeting of piece k+1 has read what it wanted of piece k, so that the slots may be
    written again for piece k+2.

    `meet` counts phases: each worker publishes the number that it has reached, and whoever finds that it was the last
    opens the gate, a word on which all others look, or sleep. So a worker sleeps at most once in a phase, and one
    system call wakes all. Finding this out without an atomic operation needs a memory barrier between one's own
    writing and the reading of the others' (x86-64 lets a processor read first): taking a lock that nobody
    else wants is one. If the last one dies before it opens the gate, those that sleep find it out after 50 ms.

    The calls are compared in an operation's first phase, before any data is read; the rest follows from the call.
    After an operation has failed all later ones fail: the workers no longer agree on what comes next; and those that
    wait for this worker are told within 50 ms.
    """

    def __init__(self, memory: MemoryMap, ranks: tuple[int, ...], timeout_s: float, *, spins: bool) -> None:
        """
        Args:
            memory: what rank 0 of the group made.
            ranks: the members' ranks in the world, for messages.
            spins: whether every worker has a core of its own, so that looking is better than sleeping.
        """
        self._memory, self.rank, self.size = memory, memory.rank, memory.size
        self.ranks, self.timeout_s, self.spins = ranks, timeout_s, spins
        self._counters = Counters(memory.memories[0])
        self._words = words = self._counters.words
        self._look_s = SPIN_S if spins else _SHARED_SPIN_S
        self._own = _ROWS_AT + self.rank * _WORKER_WORDS
        end = _ROWS_AT + self.size * _WORKER_WORDS
        self._reached, first, second, self._asleep, self._gave_up, self._passed, self._taken = (
            words[_ROWS_AT + at : end : _WORKER_WORDS]
            for at in (0, _CALLS, _CALLS + 1, _ASLEEP, _GAVE_UP, _PASSED, _TAKEN)
        )
        self._calls = (first, second)
        rings = [_ROWS_AT + r * _WORKER_WORDS + ROW_BYTES // WORD_BYTES for r in range(self.size)]
        self.recorder = FlightRecorder(words, rings, ranks, self.rank)
        self._barrier = threading.Lock()
        self._phase = self._turn = self._call = self._num_passed = 0
        self._is_first = False
        self._what: str | None = None
        self._regions: dict[torch.dtype, torch.Tensor] = {}
        self._views: dict[tuple[torch.dtype, int], list[tuple[list[torch.Tensor], torch.Tensor]]] = {}
        """A table for each turn, a row for each worker. Making a view takes longer than using it."""
        self._failure = ""

    def run(self, call: int, what: str, body: Callable[..., Any], *arguments: Any) -> None:
        """One operation: `body(*arguments)`, which takes turns and meets.

        Raises:
            CollectiveError: a worker died, did not come in time, or called something else.
        """
        if self._failure or self._what is not None:
            raise self._refusal(call, what)
        self._what, self._call, self._is_first = what, call, True
        record = self.recorder.enter(call)
        try:
            # Nothing here is differentiated, and torch need not find that out at every copy: half of their time.
            with _AutoDispatchBelowAutograd():
                body(*arguments)
        except BaseException as error:
            self._failure = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._words[self._own + _GAVE_UP] = self.recorder.num_entered
            raise
        finally:
            self._what = None
        self.recorder.leave(record)

    def turn(self, dtype: torch.dtype, numel: int) -> list[torch.Tensor]:
        """The slots of a new piece: of each worker, 1-D, the first `numel` elements."""
        return self.turn_of_rows(dtype, numel)[0]

    def turn_of_rows(self, dtype: torch.dtype, numel: int) -> tuple[list[torch.Tensor], torch.Tensor]:
        """As `turn`; and the same as one table, a row for each worker."""
        self._turn = turn = (self._turn + 1) % _NUM_TURNS
        views = self._views.get((dtype, numel))
        if views is None:
            views = self._make_views(dtype, numel)
        return views[turn]

    def pieces_of(self, dtype: torch.dtype, numel: int) -> list[torch.Tensor]:
        """The slots of both turns as pieces of `numel` elements, 1-D. For use between two meetings."""
        region = self._region(dtype)
        return list(region[: region.numel() // numel * numel].view(-1, numel).unbind(0))

    def meet(self) -> None:
        """Return when all workers have come here."""
        words = self._words
        self._phase = phase = self._phase + 1
        if self._is_first:
            words[self._own + _CALLS + phase % 2] = self._call
        words[self._own] = phase
        with self._barrier:
            pass
        if min(self._reached.tolist()) >= phase:
            self._open(phase)
        else:
            self._wait(phase)
        if self._is_first:
            self._is_first = False
            if self._calls[phase % 2].tolist().count(self._call) != self.size:
                self._fail_mismatch(phase % 2)

    def pass_on(
        self,
        num_pieces: int,
        room: int,
        lag: int,
        work: Callable[[int], object],
        take: Callable[[int], object],
    ) -> None:
        """Each of `num_pieces` goes from worker to worker, in the order of rank; then all take it.

        Worker r calls `work(i)` after worker r-1 has returned from its own, and `take(i)` after the last worker
        has; i ascends. `take(i)` comes after `work(i + lag)`, so that nobody waits for both at once, and no two
        workers for each other.

        Args:
            room: how many pieces there may be at a time, from the first worker's `work` to the last one's `take`;
                more than `lag`.
        """
        first = self._num_passed
        self._num_passed = end = first + num_pieces
        own, before, last = self.rank, self.rank - 1, self.size - 1
        for index in range(num_pieces + lag):
            if index < num_pieces:
                if own > 0:
                    self._await_count(before, self._passed, first + index + 1, end)
                elif index >= room:
                    least = first + index - room + 1
                    while min(taken := self._taken.tolist()) < least:
                        self._await_count(taken.index(min(taken)), self._taken, least, end)
                work(index)
                self._count(_PASSED, first + index + 1)
            if index >= lag:
                self._await_count(last, self._passed, first + index - lag + 1, end)
                take(index - lag)
                self._count(_TAKEN, first + index - lag + 1)

    def error(
        self, cause: str, *, timed_out: bool = False, next_step: str = LOOK_FOR_THE_FIRST, name: str = ""
    ) -> CollectiveError:
        """An error of the present operation; its text ends with what each worker did last."""
        return CollectiveError(
            self.ranks[self.rank],
            name
            or f"{describe_call(self._call, self.ranks).partition(' of ')[0]} of {self._what} "
            f"(operation {self.recorder.num_entered})",
            timed_out=timed_out,
            cause=cause,
            next_step=f"{next_step}\n{self.recorder.report()}",
        )

    def give_up(self, why: str) -> None:
        """Let all later operations fail here, and tell those that wait for this worker."""
        self._failure = self._failure or why
        self._words[self._own + _GAVE_UP] = self.recorder.num_entered + 1

    def end(self, why: str) -> None:
        """Let all later operations fail here. Nobody waits for this worker in good order."""
        self._failure = self._failure or why

    def close(self) -> None:
        """Give back what was taken."""
        self._memory.close()

    def _make_views(self, dtype: torch.dtype, numel: int) -> list[tuple[list[torch.Tensor], torch.Tensor]]:
        if len(self._views) >= _MOST_VIEWS:
            self._views.clear()
        tables = [table[:, :numel] for table in self._region(dtype).view(_NUM_TURNS, self.size, -1).unbind(0)]
        self._views[dtype, numel] = views = [(list(table.unbind(0)), table) for table in tables]
        return views

    def _region(self, dtype: torch.dtype) -> torch.Tensor:
        """All slots, 1-D."""
        if dtype not in self._regions:
            offset = DATA_BEGIN + _header_bytes(self.size)
            flat = torch.frombuffer(self._memory.memories[0], dtype=dtype, offset=offset)
            self._regions[dtype] = flat[: _NUM_TURNS * self.size * SLOT_BYTES // flat.element_size()]
        return self._regions[dtype]

    def _open(self, phase: int) -> None:
        """All have reached this phase: let those go on that wait. Several may find it out, and write the same."""
        self._words[_GATE] = phase
        with self._barrier:
            pass
        if any(self._asleep.tolist()):
            self._counters.wake(_GATE)

    def _wait(self, phase: int) -> None:
        words = self._words
        begin_s = time.perf_counter()
        # Two workers may be on one core even where there are enough: who looks lets the other run.
        while words[_GATE] < phase and time.perf_counter() - begin_s < self._look_s:
            os.sched_yield()
        if words[_GATE] >= phase:
            return
        words[self._own + _ASLEEP] = 1
        try:
            while (gate := words[_GATE]) < phase:
                self._counters.sleep(_GATE, gate)
                if words[_GATE] < phase:
                    if min(self._reached.tolist()) >= phase:
                        self._open(phase)
                    else:
                        self._check(self._reached, phase, begin_s)
        finally:
            words[self._own + _ASLEEP] = 0

    def _count(self, word: int, count: int) -> None:
        """Let all see that this worker has come so far."""
        self._words[self._own + word] = count
        with self._barrier:
            pass
        if any(self._asleep.tolist()):
            self._counters.wake(self._own + word)

    def _await_count(self, rank: int, counts: memoryview, least: int, end: int) -> None:
        """Return when a worker's count is `least`; `end` is where all will be at the end of the operation."""
        if counts[rank] >= least:
            return
        begin_s = time.perf_counter()
        while counts[rank] < least and time.perf_counter() - begin_s < self._look_s:
            os.sched_yield()
        if counts[rank] >= least:
            return
        words = self._words
        word = _ROWS_AT + rank * _WORKER_WORDS + (_PASSED if counts is self._passed else _TAKEN)
        words[self._own + _ASLEEP] = 1
        try:
            while (count := words[word]) < least:
                self._counters.sleep(word, count)
                if words[word] < least:
                    self._check(self._taken, end, begin_s, rank)
        finally:
            words[self._own + _ASLEEP] = 0

    def _check(self, counts: memoryview, least: int, begin_s: float, awaited: int | None = None) -> None:
        """Raise if it makes no sense to wait any longer for those whose count is less than `least`.

        Args:
            awaited: who is waited for, if not for all of them: then some of them wait for others.
        """
        ended = self._memory.ended()
        gave_up = self._gave_up.tolist()
        # Read after what says that they are gone: one that came and then ended is no reason to fail.
        missing = [rank for rank, count in enumerate(counts.tolist()) if count < least and rank != self.rank]
        # Who gave up, and perhaps ended then, did so because of another.
        missing.sort(key=lambda rank: bool(gave_up[rank]))
        for rank in missing:
            if rank in ended:
                raise self.error(f"rank {self.ranks[rank]} has ended")
        stopped = [rank for rank in missing if self._memory.why_silent(rank)]
        for rank in missing:
            if gave_up[rank] and not stopped:
                raise self.error(f"rank {self.ranks[rank]} gave up in its operation {gave_up[rank]}")
        if missing and time.perf_counter() > begin_s + self.timeout_s:
            late = (stopped or ([] if awaited is None else [awaited]) or missing)[0]
            silent = self._memory.why_silent(late)
            cause = f"rank {self.ranks[late]} did not answer within {self.timeout_s:g} s{silent}"
            raise self.error(cause, timed_out=True)

    def _fail_mismatch(self, parity: int) -> None:
        calls = self._calls[parity].tolist()
        other = next(rank for rank, call in enumerate(calls) if call != self._call)
        raise self.error(
            f"rank {self.ranks[self.rank]} called {describe_call(self._call, self.ranks)}, "
            f"rank {self.ranks[other]} {describe_call(calls[other], self.ranks)}",
            next_step="make all workers call the same operations in the same order: does the model or the loss "
            "branch on the rank, or on its share of the data?",
        )

    def _refusal(self, call: int, what: str) -> CollectiveError:
        name = f"{describe_call(call, self.ranks).partition(' of ')[0]} of {what}"
        if self._failure:
            return self.error(f"an earlier operation failed: {self._failure}", name=name)
        return self.error(
            f"another thread of this process is inside {self._what}",
            next_step="let one thread at a time use a group, or make a group for each thread",
            name=name,
        )
