"""Messages between two workers of one host, through memory that both map."""

from __future__ import annotations

import collections
import dataclasses
import time

import torch

from paceline.comm.copying import write
from paceline.comm.flight_recorder import FlightRecorder
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

OUTBOX_BYTES = 1 << 36
"""How far a worker's outbox may grow. Pages that were never needed cost nothing."""
_LETTERS = 1024
"""Messages of a pair of workers that can be announced and not yet seen."""
_LETTER_BYTES = 32
_CHUNK_BYTES = 1 << 20
"""An outbox grows by at least so much."""
_MARK_BYTES = 64
"""Before each message: a cache line whose first word says whether it is still needed."""
_PUSH_S, _LOOK_S = 0.001, 0.0001
"""Sleeps between attempts to announce what a full ring had no room for, and between looks into all rings."""
_TAKEN = 8
"""A pair's words: how many messages were announced, and a cache line further how many were seen."""
_PAIR_BYTES = ROW_BYTES + _LETTERS * _LETTER_BYTES


def head_bytes(size: int) -> int:
    """What each worker's outbox needs before the messages: 32 KiB for each worker of the group."""
    return -(-size * _PAIR_BYTES // 4096) * 4096


@dataclasses.dataclass(frozen=True)
class _Letter:
    """The announcement of a message."""

    position: int
    """Of its bytes in the sender's outbox."""
    numel: int
    dtype: torch.dtype
    channel: int


class Mailbox:
    """Point-to-point messages among workers `0 … size-1` of one host: CPU tensors.

    Each worker has an outbox, a stretch of memory that all others map. Sending copies the tensor into a
    block of the own outbox and announces it in a ring kept for the pair: it never waits for the receiver, and
    the tensor may be changed at once. The receiver copies it out and marks the block as free, and the sender uses
    it again. An outbox grows when no free block of the message's size is left, and does not shrink: of each size it
    keeps as many blocks as lay in it at one time, with at most a quarter of room to spare.

    So nobody ever waits but who receives, for a message that was not sent yet: no order of sends and
    receives can lock workers that one process could run through. Only the ring has an end: what is sent while
    1024 messages of a pair are unseen (the receiver sees all that has come whenever it sends or receives) is announced
    later: at the next operation of any kind here, at the latest in `flush`.

    Messages of a pair in one direction on one channel arrive in the order sent; channels are independent.
    Cost of b bytes, in memory traffic: the sender and the receiver each read b and write b.
    After an operation has failed all later ones fail: the workers no longer agree on what comes next.
    """

    def __init__(
        self,
        memory: MemoryMap,
        ranks: tuple[int, ...],
        timeout_s: float,
        *,
        spins: bool,
        recorder: FlightRecorder | None = None,
    ) -> None:
        """
        Args:
            memory: what every worker of the group made, with data of `head_bytes(size)`, to grow up to `OUTBOX_BYTES`.
            ranks: the members' ranks in the world, for messages.
            spins: whether every worker has a core of its own, so that looking is better than sleeping.
            recorder: what errors are to tell of the workers' last operations.
        """
        self._recorder = recorder
        self._memory, self._rank, self._ranks, self.timeout_s = memory, memory.rank, ranks, timeout_s
        self._spin_s = SPIN_S if spins else 0.0
        self._counters = {rank: Counters(memory.memories[rank]) for rank in range(memory.size)}
        self._bytes = {
            rank: torch.frombuffer(memory.memories[rank], dtype=torch.uint8) for rank in range(memory.size)
        }
        others = [rank for rank in range(memory.size) if rank != self._rank]
        self._num_sent = dict.fromkeys(others, 0)
        self._num_seen = dict.fromkeys(others, 0)
        self._unannounced: dict[int, collections.deque[_Letter]] = {r: collections.deque() for r in others}
        self._arrived: dict[tuple[int, int], collections.deque[_Letter]] = collections.defaultdict(
            collections.deque
        )
        """By sender and channel: seen and not yet received."""
        self._end = DATA_BEGIN + head_bytes(memory.size)
        self._blocks: dict[int, collections.deque[int]] = collections.defaultdict(collections.deque)
        """Positions of all blocks of the own outbox, by their size; the one that was taken last is at the end."""
        self._failure = ""

    def send(self, tensor: torch.Tensor, to: int, what: str, channel: int) -> None:
        """Send the contiguous `tensor` to rank `to` of the group.

        Raises:
            CollectiveError: that worker has ended, or memory has.
        """
        name = f"sending {what} to rank {self._ranks[to]}"
        self._begin(name, tensor)
        if to in self._memory.ended():
            raise self._fail(name, f"rank {self._ranks[to]} has ended", timed_out=False)
        num_bytes = tensor.numel() * tensor.element_size()
        position = self._take_block(num_bytes, name)
        write(self._bytes[self._rank][position : position + num_bytes], _as_bytes(tensor))
        self._unannounced[to].append(_Letter(position, tensor.numel(), tensor.dtype, channel))
        self.look()
        self._announce_all()

    def receive_(self, tensor: torch.Tensor, source: int, what: str, channel: int) -> None:
        """Fill the contiguous `tensor` with what rank `source` of the group sends next on this channel.

        Raises:
            CollectiveError: that worker has ended or did not send in time, or sent something else.
        """
        deadline_s = time.perf_counter() + self.timeout_s
        self.look()
        while not self.take_(tensor, source, what, channel):
            self.wait_for_news(source, what, deadline_s)
            self.look()

    def look(self) -> None:
        """Read the announcements that have come, from all workers; the messages stay where they are.

        Take all that is wanted of it before the next wait, which is for what comes later.
        """
        for source, seen in self._num_seen.items():
            counters, first = self._counters[source], _ring(self._rank)
            words = counters.words
            announced = words[first]
            if announced == seen:
                continue
            for number in range(seen, announced):
                at = _letter(first, number)
                dtype, channel = DTYPES[words[at + 2]], words[at + 3]
                self._arrived[source, channel].append(_Letter(words[at], words[at + 1], dtype, channel))
            self._num_seen[source] = announced
            words[first + _TAKEN] = announced

    def take_(self, tensor: torch.Tensor, source: int, what: str, channel: int) -> bool:
        """`receive_` if the message was there at the last `look`: whether it was.

        Raises:
            CollectiveError: it is of another type or number of elements.
        """
        name = self._receiving(what, source)
        self._begin(name, tensor)
        letters = self._arrived[source, channel]
        if not letters:
            return False
        letter = letters.popleft()
        if (letter.numel, letter.dtype) != (tensor.numel(), tensor.dtype):
            raise self._fail(
                name,
                f"rank {self._ranks[source]} sent {describe(letter.dtype, letter.numel)}, "
                f"rank {self._ranks[self._rank]} receives {describe(tensor.dtype, tensor.numel())}",
                timed_out=False,
                next_step="make both workers run the same program: does it branch on the rank?",
            )
        num_bytes = tensor.numel() * tensor.element_size()
        _as_bytes(tensor).copy_(self._bytes[source][letter.position : letter.position + num_bytes])
        self._free(source, letter)
        return True

    def forget(self) -> None:
        """Throw away what has come and was not received. Nobody is sending."""
        self.look()
        for (source, _), letters in self._arrived.items():
            for letter in letters:
                self._free(source, letter)
            letters.clear()

    def _free(self, source: int, letter: _Letter) -> None:
        """Let the sender use the message's block again."""
        self._counters[source].words[(letter.position - _MARK_BYTES) // WORD_BYTES] = 0

    def wait_for_news(self, source: int, what: str, deadline_s: float) -> None:
        """Return when `source` has announced something since the last `look`, or after a while.

        Args:
            deadline_s: by `time.perf_counter`.

        Raises:
            CollectiveError: that worker has ended, or the time is up.
        """
        name = self._receiving(what, source)
        counters, word = self._counters[source], _ring(self._rank)
        if not any(self._unannounced.values()):
            least = self._num_seen[source] + 1
            counters.wait(word, least, self._spin_s, lambda: self._check_sender(source, name, deadline_s))
            return
        self._announce_all()
        time.sleep(_PUSH_S)
        if counters.words[word] == self._num_seen[source]:
            self._check_sender(source, name, deadline_s)

    def wait_for_anyone(self, what: str, deadline_s: float) -> None:
        """Return after a tenth of a millisecond, in which messages may have come from any worker.

        Raises:
            CollectiveError: all other workers have ended, or the time is up.
        """
        dead = self._memory.ended()
        self.look()
        self._announce_all()
        name = f"receiving {what} from any rank"
        if dead and len(dead) == len(self._num_seen) and not any(self._arrived.values()):
            raise self._fail(name, "all other ranks have ended", timed_out=False)
        if time.perf_counter() > deadline_s:
            raise self._fail(name, f"no rank sent it within {self.timeout_s:g} s", timed_out=True)
        time.sleep(_LOOK_S)

    def flush(self, what: str) -> None:
        """Return when everything sent is announced: at once, but for more than 1024 unseen messages of a pair."""
        name = f"sending {what}"
        deadline_s = time.perf_counter() + self.timeout_s
        self._announce_all()
        while any(self._unannounced.values()):
            self.look()
            self._announce_all()
            for to, letters in self._unannounced.items():
                if letters:
                    self._check(to, name, deadline_s)
            time.sleep(_PUSH_S)

    def give_up(self, why: str) -> None:
        """Let all later operations fail."""
        self._failure = self._failure or why

    def close(self) -> None:
        """Give back what was taken."""
        self._memory.close()

    def _receiving(self, what: str, source: int) -> str:
        return f"receiving {what} from rank {self._ranks[source]}"

    def _check_sender(self, source: int, name: str, deadline_s: float) -> None:
        # One that has sent and then ended is no reason to fail: look for death first, then for a letter.
        is_dead = source in self._memory.ended()
        if self._counters[source].words[_ring(self._rank)] == self._num_seen[source]:
            self._check(source, name, deadline_s, is_dead=is_dead)

    def _check(self, rank: int, name: str, deadline_s: float, *, is_dead: bool | None = None) -> None:
        if rank in self._memory.ended() if is_dead is None else is_dead:
            raise self._fail(name, f"rank {self._ranks[rank]} has ended", timed_out=False)
        if time.perf_counter() > deadline_s:
            silent = self._memory.why_silent(rank)
            cause = f"rank {self._ranks[rank]} did not answer within {self.timeout_s:g} s{silent}"
            raise self._fail(name, cause, timed_out=True)

    def _announce_all(self) -> None:
        """Announce what was sent, as far as the rings have room."""
        counters = self._counters[self._rank]
        words = counters.words
        for to, letters in self._unannounced.items():
            if not letters:
                continue
            first = _ring(to)
            number = self._num_sent[to]
            while letters and number - words[first + _TAKEN] < _LETTERS:
                letter = letters.popleft()
                at = _letter(first, number)
                words[at], words[at + 1] = letter.position, letter.numel
                words[at + 2], words[at + 3] = DTYPES.index(letter.dtype), letter.channel
                number += 1
            if number > self._num_sent[to]:
                self._num_sent[to] = number
                counters.publish(first, number)

    def _take_block(self, num_bytes: int, name: str) -> int:
        """The position of a free block of the own outbox for so many bytes."""
        words = self._counters[self._rank].words
        block_bytes = _block_bytes(num_bytes + _MARK_BYTES)
        blocks = self._blocks[block_bytes]
        for _ in range(len(blocks)):
            # The one that was taken first is the likeliest to be free.
            position = blocks[0]
            blocks.rotate(-1)
            if words[(position - _MARK_BYTES) // WORD_BYTES] == 0:
                break
        else:
            position = self._grow(block_bytes, name) + _MARK_BYTES
            blocks.append(position)
        words[(position - _MARK_BYTES) // WORD_BYTES] = 1
        return position

    def _grow(self, block_bytes: int, name: str) -> int:
        begin = self._end
        try:
            if begin + block_bytes > OUTBOX_BYTES:
                raise OSError(0, f"the outbox is full at {OUTBOX_BYTES >> 30} GiB")
            self._memory.reserve(begin + block_bytes, min(_CHUNK_BYTES, OUTBOX_BYTES - begin - block_bytes))
        except OSError as error:
            raise self._fail(
                name,
                f"{begin >> 20} MiB of messages wait to be received, and there is no memory for "
                f"{block_bytes >> 10} KiB more: {error.strerror}",
                timed_out=False,
                next_step="use smaller micro-batches (micro=), or a schedule that keeps fewer of them under way",
            ) from error
        self._end = begin + block_bytes
        return begin

    def _begin(self, name: str, tensor: torch.Tensor) -> None:
        assert tensor.is_contiguous()
        if self._failure:
            raise self._fail(name, f"an earlier operation failed: {self._failure}", timed_out=False)
        if tensor.dtype not in DTYPES:
            raise self._fail(name, f"{tensor.dtype} has no place in shared memory", timed_out=False)

    def _fail(
        self, name: str, cause: str, *, timed_out: bool, next_step: str = LOOK_FOR_THE_FIRST
    ) -> CollectiveError:
        self._failure = self._failure or cause
        if self._recorder is not None:
            next_step = f"{next_step}\n{self._recorder.report()}"
        return CollectiveError(
            self._ranks[self._rank], name, timed_out=timed_out, cause=cause, next_step=next_step
        )


def _ring(to: int) -> int:
    """The first word, in any outbox, of the ring for rank `to`."""
    return (DATA_BEGIN + to * _PAIR_BYTES) // WORD_BYTES


def _letter(first: int, number: int) -> int:
    """The first word of announcement `number` in the ring that begins at word `first`."""
    return first + (ROW_BYTES + number % _LETTERS * _LETTER_BYTES) // WORD_BYTES


def _block_bytes(num_bytes: int) -> int:
    """At least so many bytes, in four sizes per octave: few sizes, and at most a quarter too much."""
    step = max(_MARK_BYTES, 1 << max(0, num_bytes.bit_length() - 3))
    return -(-num_bytes // step) * step


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().view(-1).view(torch.uint8)
