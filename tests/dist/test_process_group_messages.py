"""Messages on the backend `shm`: any order of sends and receives that makes sense, and no lock-up. Real processes."""

from __future__ import annotations

import os
import re
import signal
import time

import pytest
import torch
import torch.distributed as dist
from shm_groups import run_shm

from paceline.comm.mailbox import Mailbox
from paceline.errors import CollectiveError

pytestmark = pytest.mark.shared_memory


def numbered(number: float, numel: int = 5) -> torch.Tensor:
    return torch.full((numel,), float(number))


def mixed_orders(rank: int, size: int) -> bool:
    """Everyone first posts all receives, then sends; then the other way round; in another order of ranks."""
    others = [r for r in range(size) if r != rank]
    for receives_first in (True, False):
        received = {r: numbered(-1) for r in others}
        works = []
        for receives in (receives_first, not receives_first):
            if receives:
                works += [dist.irecv(received[r], r) for r in others]
            else:
                works += [dist.isend(numbered(rank), r) for r in reversed(others)]
        for work in reversed(works):
            work.wait()
        assert all(torch.equal(t, numbered(r)) for r, t in received.items())
    received = {r: numbered(-1) for r in others}
    operations = [dist.P2POp(dist.irecv, received[r], r) for r in others]
    operations += [dist.P2POp(dist.isend, numbered(10 * rank), r) for r in others]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert all(torch.equal(t, numbered(10 * r)) for r, t in received.items())
    # Both send before either receives.
    dist.send(numbered(rank, 100_000), others[-1], tag=9) if size == 2 else None
    if size == 2:
        dist.recv(large := numbered(-1, 100_000), others[-1], tag=9)
        assert torch.equal(large, numbered(others[-1], 100_000))
    return True


@pytest.mark.parametrize("size", [2, 4])
def test_no_order_of_sends_and_receives_locks_up(size):
    assert run_shm(mixed_orders, size) == [True] * size


def matching(rank: int, size: int) -> list[float]:
    if rank == 0:
        for number, tag in enumerate((1, 2, 1, 2, 1)):
            dist.isend(numbered(number), 1, tag=tag)
        changed = numbered(99)
        work = dist.isend(changed, 1, tag=3)
        changed.zero_()
        work.wait()
        return []
    tensors = [numbered(-1) for _ in range(6)]
    # With gaps, and waited for in another order than posted.
    grid = torch.zeros(5, 2)
    works = [dist.irecv(tensors[n], 0, tag=1) for n in range(3)]
    works += [dist.irecv(t, 0, tag=2) for t in (tensors[3], grid[:, 1])]
    assert not any(work.is_success() for work in works)
    works[2].wait()
    assert all(work.is_completed() for work in works[:3])
    works[4].wait()
    works[3].wait()
    dist.recv(tensors[5], 0, tag=3)
    assert works[0].result()[0] is tensors[0]
    return [float(t[0]) for t in (*tensors[:4], grid[:, 1], tensors[5])]


def test_a_message_goes_to_the_receive_that_was_posted_first():
    assert run_shm(matching, 2)[1] == [0, 2, 4, 1, 3, 99]


def between_attempts(rank: int, size: int, folder: str) -> list[float]:
    """All messages come after the first of two receives was tried, and before the second is."""
    both = dist.FileStore(f"{folder}/both", size)
    if rank == 0:
        both.wait(["tried"])
        for tag in (1, 2):
            dist.send(numbered(tag), 1, tag=tag)
        both.set("sent", "")
        return []
    take_ = Mailbox.take_

    def slowly(mailbox, tensor, source, what, channel):
        is_taken = take_(mailbox, tensor, source, what, channel)
        if not both.check(["sent"]):
            both.set("tried", "")
            both.wait(["sent"])
        return is_taken

    Mailbox.take_ = slowly
    tensors = [numbered(-1), numbered(-1)]
    works = [dist.irecv(tensor, 0, tag=tag) for tag, tensor in enumerate(tensors, start=1)]
    for work in works:
        work.wait()
    return [float(t[0]) for t in tensors]


def test_a_message_that_comes_while_receives_are_tried_is_not_passed_over(tmp_path):
    assert run_shm(between_attempts, 2, str(tmp_path))[1] == [1, 2]


def from_anyone(rank: int, size: int) -> list[int]:
    if rank == 0:
        tensors = [numbered(-1) for _ in range(2 * (size - 1))]
        sources = [dist.recv(tensor, tag=4) for tensor in tensors]
        assert [int(t[0]) for t in tensors] == sources
        # Posted before the receive from rank 1: it takes the first message, from whomever.
        first, second = numbered(-1), numbered(-1)
        works = dist.irecv(first, tag=5), dist.irecv(second, 1, tag=5)
        dist.barrier()
        works[1].wait()
        works[0].wait()
        assert (first[0], second[0]) == (1, 2)
        return sorted(sources)
    dist.send(numbered(rank), 0, tag=4)
    dist.send(numbered(rank), 0, tag=4)
    dist.barrier()
    if rank == 1:
        dist.send(numbered(1), 0, tag=5)
        dist.send(numbered(2), 0, tag=5)
    return []


def test_from_anyone_each_message_is_taken_once():
    assert run_shm(from_anyone, 3)[0] == [1, 1, 2, 2]


def many(rank: int, size: int) -> bool:
    """More than the ring of a pair holds, both ways, before anything is received."""
    works = [dist.isend(numbered(number, 1), 1 - rank) for number in range(3000)]
    tensors = [numbered(-1, 1) for _ in range(3000)]
    for tensor in tensors:
        dist.recv(tensor, 1 - rank)
    for work in works:
        work.wait()
    return torch.equal(torch.cat(tensors), torch.arange(3000.0))


def test_many_messages_may_be_under_way():
    assert run_shm(many, 2) == [True, True]


def of_another_size(rank: int, size: int) -> None:
    dist.send(torch.zeros(3), 1) if rank == 0 else dist.recv(torch.zeros(4), 0)
    time.sleep(1.0)


def test_a_message_of_another_size_is_told():
    name, text = run_shm(of_another_size, 2, lost=[0])[1]
    assert name == "CollectiveError"
    assert text.startswith("rank 1: receiving a message from rank 0 failed")
    assert "rank 0 sent 3 × float32, rank 1 receives 4 × float32" in text
    assert "  rank 1: operation 1, receive of 4 × float32 from rank 0: entered" in text
    # The sender may not have noted yet that it is done.
    assert re.search(r"  rank 0: operation 1, send of 3 × float32 to rank 1: (done in|entered) ", text)


def lost_sender(rank: int, size: int, number: int) -> tuple[str, bool, float]:
    dist.barrier()
    if rank == 1:
        dist.send(numbered(0), 0)
        os.kill(os.getpid(), number)
    dist.recv(numbered(0), 1)
    begin_s = time.monotonic()
    with pytest.raises(CollectiveError) as caught:
        dist.recv(numbered(0), 1)
    with pytest.raises(CollectiveError, match="an earlier operation failed"):
        dist.recv(numbered(0), 1)
    return caught.value.cause, caught.value.timed_out, time.monotonic() - begin_s


def test_the_death_of_a_sender_is_noticed_within_a_second():
    cause, timed_out, waited_s = run_shm(lost_sender, 2, signal.SIGKILL, lost=[1])[0]
    assert cause == "rank 1 has ended"
    assert not timed_out
    assert waited_s < 1


def test_a_sender_that_is_stopped_is_told():
    cause, timed_out, waited_s = run_shm(lost_sender, 2, signal.SIGSTOP, timeout_s=1.5, lost=[1])[0]
    assert cause.startswith("rank 1 did not answer within 1.5 s: its process (PID ")
    assert ") is stopped (state T)" in cause
    assert timed_out
    assert 1.5 <= waited_s < 3
