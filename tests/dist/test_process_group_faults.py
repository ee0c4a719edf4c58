"""A worker is killed or stopped at each moment of each collective: all others are told, and nothing stays behind."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from preloaded import CONTEXT
from shm_groups import join_group, run_shm

from paceline.comm.meeting import meet
from paceline.comm.phases import Phases
from paceline.comm.reductions import SUM
from paceline.comm.shared_memory import SLOT_BYTES, SharedMemory
from paceline.errors import CollectiveError

pytestmark = pytest.mark.shared_memory

STOP_TIMEOUT_S = 0.4
NUM_WORLDS = 4
"""Cases are shared out among so many sets of workers, which mostly wait."""
SMALL, LARGE, PIECES = 100, 20_000, 3
MOMENTS = ("before it meets", "when it has come", "when it has met")
COUNTED = "when it has counted"


def rows(size: int) -> list[torch.Tensor]:
    return [torch.zeros(SMALL) for _ in range(size)]


COLLECTIVES: dict[str, Callable[[SharedMemory, int, int], None]] = {
    "all-reduce": lambda m, r, n: m.sum_(torch.zeros(SMALL), "a test"),
    "all-reduce in shards": lambda m, r, n: m.sum_(torch.zeros(LARGE), "a test"),
    "all-reduce in a chain": lambda m, r, n: m.sum_(torch.zeros(PIECES * SLOT_BYTES // 4), "a test"),
    "all-gather": lambda m, r, n: m.all_gather(rows(n), torch.zeros(SMALL), "a test"),
    "broadcast": lambda m, r, n: m.broadcast_(torch.zeros(SMALL), "a test", 0),
    "reduce-scatter": lambda m, r, n: m.reduce_scatter(torch.zeros(SMALL), rows(n), "a test", SUM),
    "reduce": lambda m, r, n: m.reduce_(torch.zeros(SMALL), "a test", SUM, n - 1),
    "gather": lambda m, r, n: m.gather([] if r else rows(n), torch.zeros(SMALL), "a test", 0),
    "scatter": lambda m, r, n: m.scatter(torch.zeros(SMALL), [] if r else rows(n), "a test", 0),
    "all-to-all": lambda m, r, n: m.all_to_all(rows(n), rows(n), "a test"),
    "barrier": lambda m, r, n: m.barrier("a test"),
}


def num_meetings(name: str, size: int) -> int:
    if size == 2:
        # Both read what the other has written, one piece after the other.
        return {"all-to-all": 2, "all-reduce in a chain": PIECES}.get(name, 1)
    return 2 if name == "all-to-all" or name.startswith("all-reduce in ") else 1


def num_counts(name: str, size: int) -> int:
    """How often each worker tells that it has passed a piece on, or taken one."""
    return 2 * PIECES if name == "all-reduce in a chain" and size > 2 else 0


def cases(size: int) -> list[tuple[str, int, int, str]]:
    """Collective, victim, number of the meeting or of what is counted, moment."""
    return [
        (name, victim, number, moment)
        for name in COLLECTIVES
        for victim in range(size)
        for number, moment in [
            *itertools.product(range(num_meetings(name, size)), MOMENTS),
            *((count, COUNTED) for count in range(num_counts(name, size))),
        ]
    ]


def script_fault(meeting: int, moment: str, number: int) -> None:
    """From now on `Phases.meet`, or `Phases._count`, is fatal at the given number and moment."""
    met, counted = itertools.count(), itertools.count()
    present = -1
    real_meet, real_count = Phases.meet, Phases._count

    def fall(at: str) -> None:
        if (present, at) == (meeting, moment):
            os.kill(os.getpid(), number)

    def meet_or_fall(self: Phases) -> None:
        nonlocal present
        present = next(met)
        fall(MOMENTS[0])
        real_meet(self)
        fall(MOMENTS[2])

    def count_or_fall(self: Phases, word: int, count: int) -> None:
        real_count(self, word, count)
        if (next(counted), COUNTED) == (meeting, moment):
            os.kill(os.getpid(), number)

    Phases.meet, Phases._count = meet_or_fall, count_or_fall
    real = {name: getattr(Phases, name) for name in ("_open", "_wait")}
    for name in real:

        def wait_or_fall(self: Phases, phase: int, name: str = name) -> None:
            fall(MOMENTS[1])
            real[name](self, phase)

        setattr(Phases, name, wait_or_fall)


def play_case(rank: int, size: int, case: tuple[str, int, int, str], number: int, folder: Path) -> None:
    """What one worker does and is told in a case; only who survives it returns."""
    name, victim, meeting, moment = case
    timeout_s = STOP_TIMEOUT_S if number == signal.SIGSTOP else 20.0
    store = dist.FileStore(str(folder / "store"), size)
    met = meet(store, tuple(range(size)), rank, size, datetime.timedelta(seconds=30))
    assert not isinstance(met, str), met
    memory, mailbox = met
    memory.barrier("the start")
    memory.phases.timeout_s = timeout_s
    if rank == victim:
        script_fault(meeting, moment, number)
    begin_s = time.monotonic()
    try:
        COLLECTIVES[name](memory, rank, size)
        memory.barrier("the end")
        told = ["nothing was noticed"]
    except CollectiveError as error:
        told = [error.operation, error.cause, error.timed_out, str(error)]
    (folder / f"{rank}.json").write_text(json.dumps([time.monotonic() - begin_s, *told]))
    memory.close()
    mailbox.close()


def play_rank(rank: int, size: int, world: int, number: int, folder: Path) -> None:
    """One rank in each case of one world. Where it is the victim, a fork of this process falls in its place."""
    torch.set_num_threads(1)
    for index, case in list(enumerate(cases(size)))[world::NUM_WORLDS]:
        place = folder / str(index)
        place.mkdir(exist_ok=True)
        if rank != case[1]:
            play_case(rank, size, case, number, place)
            continue
        child = os.fork()
        if child == 0:
            try:
                play_case(rank, size, case, number, place)
            finally:
                os._exit(1)
        _, status = os.waitpid(child, os.WUNTRACED)
        if os.WIFSTOPPED(status):
            # Until the others have given up.
            while len(list(place.glob("*.json"))) < size - 1:
                time.sleep(0.02)
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize("size", [2, 4])
def test_whoever_falls_whenever_all_others_are_told(size, number, tmp_path):
    before = sorted(os.listdir("/dev/shm"))
    processes = [
        CONTEXT.Process(target=play_rank, args=(rank, size, world, number, tmp_path))
        for world in range(NUM_WORLDS)
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    deadline_s = time.monotonic() + 100
    for process in processes:
        process.join(max(0.0, deadline_s - time.monotonic()))
        process.kill()
    assert {process.exitcode for process in processes} == {0}
    wrong = []
    for index, case in enumerate(cases(size)):
        victim = case[1]
        for rank in range(size):
            path = tmp_path / str(index) / f"{rank}.json"
            if rank == victim:
                assert not path.exists(), case
            elif not path.exists() or not is_told_well(
                json.loads(path.read_text()), case, rank, size, number
            ):
                wrong.append((case, rank, path.read_text() if path.exists() else "nothing"))
    assert not wrong, f"{len(wrong)} of {len(cases(size)) * (size - 1)}, the first: {wrong[0]}"
    assert sorted(os.listdir("/dev/shm")) == before


def is_told_well(told: list, case: tuple[str, int, int, str], rank: int, size: int, number: int) -> bool:
    name, victim, meeting, moment = case
    if len(told) != 5:
        return False
    waited_s, operation, cause, timed_out, text = told
    # Who came to the last meeting of an operation is missed in the next only.
    is_next = meeting == num_meetings(name, size) - 1 and moment in MOMENTS[1:]
    kind = (
        "barrier of the end (operation 3)" if is_next else f"{name.split(' in ')[0]} of a test (operation 2)"
    )
    if number == signal.SIGKILL:
        is_right = cause == f"rank {victim} has ended" and not timed_out and waited_s < 1.0
    else:
        silent = cause.startswith(f"rank {victim} did not answer within 0.4 s: its process (PID ")
        is_right = silent and ") is stopped (state T)" in cause and timed_out
        is_right = is_right and STOP_TIMEOUT_S <= waited_s < STOP_TIMEOUT_S + 1
    records = [line for line in text.splitlines() if line.startswith("  rank ")]
    return is_right and operation == kind and len(records) == size + 1 + is_next


def train_until_it_falls(rank: int, size: int, victim: int, number: int, moment: str) -> tuple[str, str, float]:
    """Steps of DDP; in the third, one worker falls. The error that this one gets, and after how long."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.Tanh(), torch.nn.Linear(256, 64))
    wrapped = torch.nn.parallel.DistributedDataParallel(model, bucket_cap_mb=0.05)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    inputs = torch.randn(8, 64)
    begin_s = time.monotonic()
    try:
        for step in range(20):
            if step == 2:
                begin_s = time.monotonic()
            falls = rank == victim and step == 2
            if falls and moment == "forward":
                os.kill(os.getpid(), number)
            loss = wrapped(inputs).square().sum()
            if falls and moment == "backward":
                # The last layer's gradients are on their way, the first's are not.
                model[0].weight.register_hook(lambda _: os.kill(os.getpid(), number))
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    except Exception as error:
        return type(error).__name__, str(error), time.monotonic() - begin_s
    return "nothing", "", time.monotonic() - begin_s


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP], ids=["killed", "stopped"])
@pytest.mark.parametrize(("victim", "moment"), [(0, "backward"), (1, "forward"), (2, "backward")])
def test_who_falls_under_ddp_is_named_to_all_others(victim, moment, number):
    timeout_s = 2.0
    told = run_shm(train_until_it_falls, 3, victim, number, moment, timeout_s=timeout_s, lost={victim})
    for rank in {0, 1, 2} - {victim}:
        _, text, waited_s = told[rank]
        if number == signal.SIGKILL:
            assert f"rank {victim} has ended" in text
            assert waited_s < 1.0
        else:
            assert f"rank {victim} did not answer within 2 s" in text
            assert "is stopped (state T)" in text
            assert waited_s < timeout_s + 1
        assert f"rank {rank}: all-reduce of " in text
        assert "(operation " in text


def reduce_for_ever(rank: int, folder: Path) -> None:
    join_group(rank, 3, str(folder / "group"))
    while True:
        dist.all_reduce(torch.ones(1 << 20))
        (folder / "ready" / str(rank)).touch()


def test_nothing_stays_when_all_are_killed_at_once(tmp_path):
    before = sorted(os.listdir("/dev/shm"))
    for name in ("group", "ready"):
        (tmp_path / name).mkdir()
    processes = [CONTEXT.Process(target=reduce_for_ever, args=(rank, tmp_path)) for rank in range(3)]
    for process in processes:
        process.start()
    try:
        deadline_s = time.monotonic() + 30
        while len(list((tmp_path / "ready").iterdir())) < 3:
            assert time.monotonic() < deadline_s, "they do not reduce"
            time.sleep(0.02)
        maps = Path(f"/proc/{processes[0].pid}/maps").read_text()
    finally:
        for process in processes:
            process.kill()
        for process in processes:
            process.join()
    assert "/memfd:paceline (deleted)" in maps, "the memory has no name that could stay"
    assert sorted(os.listdir("/dev/shm")) == before
    assert [path.name for path in (tmp_path / "group").iterdir()] == ["store"]
