"""What the workers of a group do together: right, and never a hang, through memory and through gloo. Real processes."""

from __future__ import annotations

import os
import resource
import signal
import time
from pathlib import Path

import pytest
import torch
from groups import run_group

from paceline.comm import memory_map
from paceline.comm.group import Group
from paceline.comm.mailbox import _block_bytes
from paceline.comm.shared_memory import SLOT_BYTES
from paceline.comm.world import World
from paceline.errors import CollectiveError

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool)
LENGTHS = {"auto": (1, 5, SLOT_BYTES // 16 + 3, SLOT_BYTES // 4 + 1), "gloo": (1, 4099)}
"""Of each worker's range: around the size of a slot, where there are slots."""
SHARED = pytest.mark.shared_memory
TRANSPORTS = (pytest.param("auto", marks=SHARED), "gloo")


def everyone(world: World) -> Group:
    group = world.group_of(tuple(range(world.size)), busy=world.size, mailbox=True)
    assert group is not None
    assert group.has_mailbox == (world.transport == "auto"), group.why_no_memory
    return group


def random(rank: int, length: int, dtype: torch.dtype) -> torch.Tensor:
    values = torch.randn(length, generator=torch.Generator().manual_seed(rank), dtype=torch.float64)
    return (values * 1000).to(dtype) if dtype != torch.bool else values > 0


def collectives(world: World) -> list[str]:
    """What differs from the same written out in this process."""
    group, size = everyone(world), world.size
    wrong = []
    for dtype in DTYPES:
        for length in LENGTHS[world.transport]:
            inputs = [random(rank, size * length, dtype) for rank in range(size)]
            full = inputs[world.rank].clone()
            group.all_gather_(full, "a test")
            wanted = torch.cat([t.view(size, length)[rank] for rank, t in enumerate(inputs)])
            if not torch.equal(full, wanted):
                wrong.append(f"all-gather of {length} × {dtype}")
            received = torch.empty_like(full)
            group.all_to_all_(received, inputs[world.rank], "a test")
            if not torch.equal(received, torch.cat([t.view(size, length)[world.rank] for t in inputs])):
                wrong.append(f"all-to-all of {length} × {dtype}")
            if not torch.equal(group.gather(inputs[world.rank], "a test"), torch.stack(inputs)):
                wrong.append(f"gather of {length} × {dtype}")
            if dtype == torch.bool:
                continue
            full = inputs[world.rank].clone()
            group.reduce_scatter_(full, "a test")
            wanted = inputs[0].clone()
            for tensor in inputs[1:]:
                wanted += tensor
            own = slice(world.rank * length, (world.rank + 1) * length)
            if not torch.equal(full[own], wanted[own]):
                wrong.append(f"reduce-scatter of {length} × {dtype}")
    if group.waited_s <= 0:
        wrong.append("nothing was counted")
    return wrong


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("size", [2, 4])
def test_all_gather_and_reduce_scatter_are_exact(size, transport):
    """The order of addition is that of the ranks, so that the same bits come out."""
    assert run_group(collectives, size, transport=transport) == {rank: [] for rank in range(size)}


def two_under_way(world: World) -> tuple[list[float], list[float], int]:
    """Twice: the second time buffers are used again."""
    group = everyone(world)
    own = slice(world.rank * 4, world.rank * 4 + 4)
    for _ in range(2):
        first, second = torch.full((8,), 1.0), torch.full((8,), 10.0 * (world.rank + 1))
        pending = group.start_reduce_scatter(first, "a first"), group.start_reduce_scatter(second, "a second")
        for operation in pending:
            operation.wait()
    return first[own].tolist(), second[own].tolist(), sum(map(len, group._wired._scratch.values()))


def test_two_of_the_same_size_may_be_under_way_at_once():
    assert run_group(two_under_way, 2, transport="gloo")[1] == ([2.0] * 4, [30.0] * 4, 2)


def messages(world: World) -> list[str]:
    """Everyone sends everyone tensors of all types and shapes on two channels, and receives the second one first."""
    group = everyone(world)
    others = [rank for rank in range(world.size) if rank != world.rank]
    kinds = [(dtype, shape) for dtype in DTYPES for shape in ((), (0,), (3, 5), (70_001,))]
    pending = []
    for to in others:
        for channel in (0, 1):
            for number, (dtype, shape) in enumerate(kinds):
                tensor = message(world.rank, to, channel, number, dtype, shape)
                pending.append(group.start_send(tensor, to, "a test", channel))
    wrong = []
    for source in others:
        for channel in (1, 0):
            for number, (dtype, shape) in enumerate(kinds):
                received = group.receive_(torch.zeros(shape, dtype=dtype), source, "a test", channel)
                if not torch.equal(received, message(source, world.rank, channel, number, dtype, shape)):
                    wrong.append(f"{number} on {channel} from {source}")
    for sent in pending:
        sent.wait()
    return wrong


def message(source: int, to: int, channel: int, number: int, dtype: torch.dtype, shape) -> torch.Tensor:
    seed = ((source * 10 + to) * 10 + channel) * 100 + number
    return random(seed, int(torch.Size(shape).numel()), dtype).view(shape)


@pytest.mark.parametrize(("size", "transport"), [pytest.param(2, "auto", marks=SHARED), pytest.param(3, "auto", marks=SHARED), (2, "gloo")])
def test_messages_arrive_in_the_order_of_their_channel(size, transport):
    assert run_group(messages, size, transport=transport) == {rank: [] for rank in range(size)}


def series(world: World, rounds_ahead: int) -> list[int]:
    """Rank 0 sends messages of kinds that do not come in turn; which of them have not arrived as they were."""
    group = everyone(world)
    numels = [5, 5, 900, 5, 7, 7, 5, 900, 900, 7, 5]
    if world.rank == 0:
        sent = [torch.full((n,), float(at)) for at, n in enumerate(numels)]
        pending = [group.start_send(tensor, 1, "a series") for tensor in sent]
        for one in pending:
            one.wait()
        return []
    received = [group.receive_(torch.zeros(n), 0, "a series", 0, rounds_ahead) for n in numels]
    return [at for at, tensor in enumerate(received) if not bool((tensor == at).all())]


@pytest.mark.parametrize("rounds_ahead", [0, 2])
def test_a_message_of_another_kind_than_was_awaited_arrives_as_well(rounds_ahead):
    assert run_group(series, 2, rounds_ahead, transport="gloo") == {0: [], 1: []}


def rounds(world: World) -> list[float]:
    """Rank 0 sends rounds of a small and a large message and is rid of all of them before rank 1, which waits for word
    of that, asks for the last two. What rank 1 has received of the large ones."""
    group = everyone(world)
    num_rounds, ahead = 5, 2
    if world.rank == 0:
        sent = [t for at in range(num_rounds) for t in (torch.zeros(1), torch.full((1 << 20,), float(at)))]
        for one in [group.start_send(tensor, 1, "a round") for tensor in sent]:
            one.wait()
        group.start_send(torch.zeros(1), 1, "word", 1).wait()
        return []
    received = []
    for at in range(num_rounds):
        if at == num_rounds - ahead:
            group.receive_(torch.zeros(1), 0, "word", 1)
        group.receive_(torch.zeros(1), 0, "a round", 0, ahead)
        received += group.receive_(torch.zeros(1 << 20), 0, "a round", 0, ahead).unique().tolist()
    return received


def test_rounds_ahead_come_before_they_are_asked_for():
    assert run_group(rounds, 2, transport="gloo") == {0: [], 1: [0.0, 1.0, 2.0, 3.0, 4.0]}


def storm(world: World, num_small: int, num_large: int, flushes: bool) -> bool:
    """All send everything before anyone receives anything; the tensors are used again where that is allowed."""
    group = everyone(world)
    others = [rank for rank in range(world.size) if rank != world.rank]
    large = torch.empty(1 << 18)
    pending = []
    for to in others:
        pending += [
            group.start_send(torch.tensor([world.rank, number]), to, "a small one")
            for number in range(num_small)
        ]
        for number in range(num_large):
            if world.transport == "gloo":
                large = torch.empty(1 << 18)
            pending.append(group.start_send(large.fill_(world.rank + 10 * number), to, "a large one", 1))
    if flushes:
        for sent in pending:
            sent.wait()
    right = True
    for source in others:
        for number in range(num_small):
            received = group.receive_(torch.zeros(2, dtype=torch.int64), source, "a small one")
            right &= received.tolist() == [source, number]
        for number in range(num_large):
            received = group.receive_(torch.zeros(1 << 18), source, "a large one", 1)
            right &= bool((received == source + 10 * number).all())
    if not flushes:
        for sent in pending:
            sent.wait()
    return right


@pytest.mark.parametrize(
    ("size", "transport", "num_small", "num_large", "flushes"),
    [
        pytest.param(2, "auto", 1500, 32, True, marks=SHARED),
        pytest.param(2, "auto", 1500, 32, False, marks=SHARED),
        pytest.param(4, "auto", 300, 2, False, marks=SHARED),
        (2, "gloo", 200, 12, False),
    ],
)
def test_all_may_send_before_any_receives(size, transport, num_small, num_large, flushes):
    """With two workers 32 MiB in each direction, and more messages than can be announced at a time."""
    results = run_group(storm, size, num_small, num_large, flushes, transport=transport, timeout_s=30.0)
    assert results == dict.fromkeys(range(size), True)


def send_unseen(world: World) -> bool:
    """Rank 1 looks at nothing until more messages were sent than can be announced at a time."""
    group, right = everyone(world), True
    if world.rank == 0:
        pending = [group.start_send(torch.tensor([number]), 1, "a test") for number in range(2500)]
        group.barrier("all are sent")
        pending[-1].wait()
    else:
        group.barrier("all are sent")
        for number in range(2500):
            right &= int(group.receive_(torch.tensor([-1]), 0, "a test")) == number
    return right


@pytest.mark.shared_memory
def test_more_messages_than_can_be_announced_wait_with_their_sender():
    assert run_group(send_unseen, 2) == {0: True, 1: True}


def wait_elsewhere(world: World) -> float:
    """0 sends to 1 and waits for 2, who waits for 1: the message must arrive whatever its sender does next."""
    group = everyone(world)
    pair = world.group_of((0, 2), busy=3)
    tensor = torch.full((1 << 23,), 7.0)
    if world.rank == 0:
        group.start_send(tensor, 1, "a test")
    elif world.rank == 1:
        group.receive_(tensor.zero_(), 0, "a test")
        group.start_send(tensor[:1], 2, "a test").wait()
    else:
        group.receive_(tensor[:1], 1, "a test")
    if pair is not None:
        pair.barrier("a test")
    return float(tensor[0])


@pytest.mark.shared_memory
def test_a_message_arrives_while_its_sender_waits_in_another_group():
    assert run_group(wait_elsewhere, 3) == dict.fromkeys(range(3), 7.0)


def use_memory_again(world: World) -> tuple[int, int]:
    group = everyone(world)
    small, large = torch.zeros(1 << 18), torch.zeros((1 << 18) + 100)
    for _ in range(100):
        for tensor in (small, large):
            for to in (1 - world.rank,):
                group.start_send(tensor, to, "a test")
            group.receive_(tensor, 1 - world.rank, "a test")
    mailbox = group._mailbox
    assert mailbox is not None
    return mailbox._end, mailbox._memory._reserved_bytes


@pytest.mark.shared_memory
def test_memory_is_used_again():
    """200 MiB each way, at most two messages at a time of 1 MiB: one more step than the other may be ahead."""
    for end, reserved in run_group(use_memory_again, 2).values():
        assert 1 << 20 < end < 6 << 20
        assert end <= reserved < end + (2 << 20)


def forget_messages(world: World) -> tuple[float, bool]:
    """1 has not received what 0 has sent, as after a step that failed; then messages of another kind follow."""
    group = everyone(world)
    for number in range(40):
        if world.rank == 0:
            group.start_send(torch.ones(1 << 18), 1, "a test", channel=number % 2)
        group.barrier("all is sent")
        group.forget_messages()
        group.barrier("all is forgotten")
    found = torch.zeros(7)
    if world.rank == 0:
        group.start_send(torch.full((7,), 3.0), 1, "a test").wait()
    else:
        group.receive_(found, 0, "a test")
    group.barrier("all is received")
    assert group._mailbox is not None
    return float(found.sum()), group._mailbox._end < 4 << 20


@pytest.mark.shared_memory
def test_messages_that_nobody_received_are_forgotten_and_their_memory_is_used_again():
    assert run_group(forget_messages, 2) == {0: (0.0, True), 1: (21.0, True)}


def under_a_limit(world: World) -> tuple[str, str, float]:
    """The worker that makes the memory may have no file, and so no memory of this kind, above 1 MiB."""
    if world.rank == 0:
        _, most = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, most))
    group = world.group(2)
    assert group is not None
    return group.transport, group.why_no_memory, float(group.sum_(torch.ones(3), "a test")[0])


@pytest.mark.shared_memory
def test_a_limit_of_the_system_is_told_and_gloo_goes_on():
    reason = "rank 0 cannot reserve shared memory: File too large"
    assert run_group(under_a_limit, 2) == dict.fromkeys(range(2), ("gloo", reason, 2.0))


@pytest.mark.parametrize("num_bytes", [1, 64, 65, 1000, 4096, 4097, (1 << 20) + 64, 123_456_789])
def test_blocks_have_little_to_spare(num_bytes):
    assert num_bytes <= _block_bytes(num_bytes) <= max(1.25 * num_bytes, num_bytes + 63)
    assert _block_bytes(num_bytes) % 64 == 0


def no_more_memory(world: World) -> None:
    group = everyone(world)
    if world.rank == 1:
        group.receive_(torch.zeros(1), 0, "a test")

    def refuse(*_: object) -> None:
        raise OSError(28, "No space left on device")

    memory_map.os.posix_fallocate = refuse
    group.start_send(torch.zeros(1 << 20), 1, "activations")


@pytest.mark.shared_memory
def test_memory_that_is_not_there_is_an_error_not_a_crash():
    operation, timed_out, cause = run_group(no_more_memory, 2, lost=1)[0]
    assert operation == "sending activations to rank 1"
    assert not timed_out
    assert cause == (
        "0 MiB of messages wait to be received, and there is no memory for 5120 KiB more: No space left on device"
    )


def mismatch(world: World, kind: str) -> None:
    group = everyone(world)
    if world.rank == 0:
        group.start_send(torch.zeros(8), 1, "activations").wait()
    elif kind == "length":
        group.receive_(torch.zeros(9), 0, "activations")
    else:
        group.receive_(torch.zeros(8, dtype=torch.int32), 0, "activations")


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("length", "rank 0 sent 8 × float32, rank 1 receives 9 × float32"),
        ("type", "rank 0 sent 8 × float32, rank 1 receives 8 × int32"),
    ],
)
def test_messages_that_do_not_match_are_reported_with_both_sides(transport, kind, words):
    operation, timed_out, cause = run_group(mismatch, 2, kind, transport=transport, lost=0)[1]
    assert "receiving activations from rank 0" in operation
    assert not timed_out
    assert cause == words


def lose_a_worker(world: World, doing: str, how: int) -> tuple[str, bool, str, float]:
    """In the group of ranks 1 and 2, rank 2 is lost while rank 1 receives from it, or sends to it."""
    everyone(world).barrier("a test")
    group = world.group_of((1, 2), busy=2, mailbox=True)
    if group is None:
        raise CollectiveError(0, "not in the group", timed_out=False, cause="")
    tensor = torch.zeros(1000)
    if world.rank == 2:
        group.receive_(tensor, 0, "activations")
        group.start_send(tensor, 0, "gradients").wait()
        os.kill(os.getpid(), how)
    group.start_send(tensor, 1, "activations").wait()
    begin_s = time.monotonic()
    try:
        group.receive_(tensor, 1, "gradients")
        while True:
            if doing == "receive":
                group.receive_(tensor, 1, "gradients")
            group.start_send(tensor, 1, "activations").wait()
            time.sleep(0.01)
    except CollectiveError as error:
        return error.operation, error.timed_out, error.cause, time.monotonic() - begin_s


@pytest.mark.parametrize("transport", TRANSPORTS)
@pytest.mark.parametrize("doing", ["receive", "send"])
def test_a_death_is_noticed_within_two_seconds(doing, transport):
    results = run_group(lose_a_worker, 3, doing, signal.SIGKILL, transport=transport, lost=2)
    operation, timed_out, cause, seconds = results[1]
    verb = "receiving gradients from" if doing == "receive" else "sending activations to"
    assert operation.startswith(f"{verb} rank 2")
    assert cause.startswith("rank 2 has ended" if transport == "auto" else "rank 2 is gone")
    assert not timed_out
    assert seconds < 2.0


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_a_silent_worker_is_named_when_the_time_is_up(transport):
    results = run_group(
        lose_a_worker, 3, "receive", signal.SIGSTOP, transport=transport, timeout_s=2.0, lost=2
    )
    operation, timed_out, cause, seconds = results[1]
    assert operation.startswith("receiving gradients from rank 2")
    assert timed_out
    assert cause.startswith("rank 2 did not answer within 2 s")
    assert seconds > 1.5


def send_and_end(world: World) -> float:
    group = everyone(world)
    if world.rank == 0:
        group.start_send(torch.full((1 << 20,), 3.0), 1, "a test").wait()
        os.kill(os.getpid(), signal.SIGKILL)
    tensor = torch.zeros(1 << 20)
    while 0 not in group._mailbox._memory.ended():
        time.sleep(0.01)
    return float(group.receive_(tensor, 0, "a test")[-1])


@pytest.mark.shared_memory
def test_what_was_sent_arrives_though_its_sender_has_ended():
    assert run_group(send_and_end, 2, lost=0) == {1: 3.0}


def use_after_a_mismatch(world: World) -> None:
    group = everyone(world)
    if world.rank == 0:
        group.start_send(torch.zeros(8), 1, "a test")
        group.start_send(torch.zeros(8), 1, "a test").wait()
        time.sleep(30)
    with pytest.raises(CollectiveError):
        group.receive_(torch.zeros(9), 0, "a first test")
    group.receive_(torch.zeros(8), 0, "a second test")


@pytest.mark.shared_memory
def test_after_a_failure_nothing_is_received_any_more():
    operation, _, cause = run_group(use_after_a_mismatch, 2, lost=0)[1]
    assert "a second test" in operation
    assert cause.startswith("an earlier operation failed: rank 0 sent 8")


def test_a_group_of_one_talks_to_nobody():
    group = Group.alone(torch.device("cpu"), rank=3)
    tensor = torch.arange(4.0)
    assert group.all_gather_(tensor, "a test").tolist() == [0, 1, 2, 3]
    assert group.reduce_scatter_(tensor, "a test").tolist() == [0, 1, 2, 3]
    assert (group.ranks, group.transport, group.waited_s) == ((3,), "none", 0.0)


def policies_of_gloo(world: World) -> set[int]:
    """How gloo's loops are scheduled, of the group of all and of one that was made later."""
    everyone(world)
    world.group_of((0, 1), busy=2)
    tasks = [task for task in Path("/proc/self/task").iterdir() if (task / "comm").read_text().strip() == "gloo_tcp_loop"]
    return {os.sched_getscheduler(int(task.name)) for task in tasks}


@pytest.mark.skipif(not hasattr(os, "SCHED_BATCH"), reason="only Linux has batch threads")
@pytest.mark.parametrize("transport", TRANSPORTS)
def test_gloo_does_not_take_the_processor_from_who_calls_it(transport):
    found = run_group(policies_of_gloo, 3, transport=transport)
    assert found == dict.fromkeys(range(3), {os.SCHED_BATCH})
