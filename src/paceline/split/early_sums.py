"""Adding up shared gradients over several hosts while the backward pass goes on."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Callable, Sequence

from paceline.comm.group import Group
from paceline.comm.memory_map import DATA_BEGIN, WORD_BYTES, MemoryMap
from paceline.errors import JobError
from paceline.split.shared_layout import Flat, Member, Segment
from paceline.split.tensor_mode import plainly


@dataclasses.dataclass(eq=False)
class _Departure:
    """A segment on its way."""

    number: int
    flat: Flat
    buckets: list[tuple[int, slice]]
    """Of this worker's share: what travels in one message, and the message's number."""
    num_parameters: int
    num_missing: int
    is_sent: bool = False


class EarlySums:
    """Sums of gradients, of which each worker of a host has a share, within the host and then over the hosts.

    In the last backward pass of a step each worker counts which segments its gradients are complete of, and says so in
    memory that the others of its host read. Whenever a gradient comes, it looks which segments all have left, adds up
    its share of them, and begins to send it. Nobody waits for anybody before `finish`, which sends the rest.

    Hosts need not begin in the same order, as every message has a number. A parameter that is not used holds back the
    segment that it lies in, and no other. So does one whose gradient did not come exactly once in the last backward
    pass of the step before: where it comes in several pieces, none tells whether it is the last.

    Cost per step and worker, beside what it takes without: a meeting on the host, and at each gradient some µs.
    """

    def __init__(
        self,
        flats: Sequence[Flat],
        group: Group,
        memory: MemoryMap,
        words_at: int,
        bucket_bytes: int,
        add_up: Callable[[Flat, slice], None],
    ) -> None:
        """
        Args:
            memory: of all workers of the host; each one's stretch has `words_bytes` for this at `words_at`.
            bucket_bytes: of a message, about.
            add_up: replaces a range of this worker's gradients by its sum over the host's workers.
        """
        assert group.grid is not None
        self._group, self._place, self._add_up = group, group.grid.place, add_up
        self._departures: list[_Departure] = []
        self._of: dict[Segment, _Departure] = {}
        num_messages = 0
        for flat in flats:
            for segment in flat.segments:
                ranges = _buckets(segment.share(self._place), bucket_bytes // flat.dtype.itemsize)
                count = len(segment.members)
                buckets = list(enumerate(ranges, num_messages))
                self._of[segment] = departure = _Departure(len(self._departures), flat, buckets, count, count)
                self._departures.append(departure)
                num_messages += len(buckets)
        first = (DATA_BEGIN + words_at) // WORD_BYTES
        self._words = [
            memoryview(memory.memories[place]).cast("q")[first : first + len(self._departures)]
            for place in range(group.grid.per_host)
        ]
        """Of each worker and segment, the last step in which it was complete before the end of the backward pass."""
        self._step = 1
        self._is_last = False
        self._waiting: list[_Departure] = []
        """Complete here, and perhaps not on others."""
        self._times: collections.Counter[Member] = collections.Counter()
        """How often gradients have come in the step's last backward pass."""
        self._expected: set[Member] = set()
        """Those that came once in the step before."""

    def begin_backward(self, *, last: bool) -> None:
        """Called before each backward pass; `last` is the step's last micro-batch."""
        self._is_last = last
        if last:
            self._times.clear()
            self._waiting.clear()
            for departure in self._departures:
                departure.num_missing = departure.num_parameters

    def came(self, member: Member) -> None:
        """A gradient has been taken.

        Raises:
            JobError: it was on its way already.
        """
        if not self._is_last:
            return
        self._times[member] += 1
        departure = self._of[member.segment]
        if self._times[member] == 1 and member in self._expected:
            departure.num_missing -= 1
            if departure.num_missing == 0:
                # Written last: it says that the gradients before it may be read.
                self._words[self._place][departure.number] = self._step
                self._waiting.append(departure)
        elif departure.num_missing == 0:
            raise JobError(
                f"the gradient of {member.name} came in several pieces, and the first one was sent",
                cause="in the step before it came in one: the model uses the parameter in several pieces that are "
                "differentiated apart (torch.utils.checkpoint with use_reentrant=True), in some steps only",
                next_step="use use_reentrant=False",
            )
        if self._waiting:
            self._send_what_is_there()

    def finish(self) -> None:
        """When all gradients are in place: return when this worker's share is added up."""
        self._is_last = False
        self._group.barrier_on_host("gradients")
        for departure in self._departures:
            if not departure.is_sent:
                self._send(departure)
            departure.is_sent = False
        self._group.finish_sums_between_hosts()
        self._expected = {member for member, times in self._times.items() if times == 1}
        self._times.clear()
        self._step += 1

    def _send_what_is_there(self) -> None:
        step = self._step
        there = [d for d in self._waiting if all(words[d.number] >= step for words in self._words)]
        if there:
            self._waiting = [d for d in self._waiting if d not in there]
            with plainly():
                for departure in there:
                    self._send(departure)

    def _send(self, departure: _Departure) -> None:
        flat = departure.flat
        for number, bucket in departure.buckets:
            self._add_up(flat, bucket)
            self._group.start_sum_between_hosts(flat.gradients[self._place][bucket], "gradients", number)
        departure.is_sent = True


def words_bytes(flats: Sequence[Flat]) -> int:
    """What `EarlySums` needs of each worker's memory."""
    return WORD_BYTES * sum(len(flat.segments) for flat in flats)


def _buckets(share: slice, most: int) -> list[slice]:
    """A share cut evenly in ranges of about `most` numbers."""
    numel = share.stop - share.start
    count = max(1, round(numel / most)) if numel else 0
    bounds = [share.start + numel * at // count for at in range(count + 1)] if count else []
    return [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
