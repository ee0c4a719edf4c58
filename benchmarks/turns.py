"""Taking turns: programs that train one after the other, a second or two each, in one measurement.

A shared machine changes its speed from one minute to the next. Programs that were started together and train
by turns see the same machine; those that wait sleep, each rank in a read of its own pipe.

The first turn of each program is not timed but compared: its ranks report the global loss of each step.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

TURN_S = 1.5
COMPARED_STEPS = 5
WARM_UP_STEPS = 8
_POLL_S = 0.02
_TURN_TIMEOUT_S = 300.0
_ERROR = re.compile(
    r"(?:\[rank\d+\]: )?((?!torch\.distributed\.elastic)(?:\w+\.)*\w+(?:Error|Exception|Interrupt): .*)"
)
"""The last line of a traceback; torchrun's own does not count."""


@dataclasses.dataclass(frozen=True)
class Turn:
    """What a program is to do now."""

    steps: int
    compared: bool
    """The global loss of each step is asked for, with dropout switched off; the time is not."""


@dataclasses.dataclass(frozen=True)
class Done:
    """What a program did in a turn."""

    seconds: float
    samples: int
    losses: list[float]
    peak_bytes: list[int]
    """Of each rank so far."""


@dataclasses.dataclass
class Measured:
    """One program over all rounds."""

    losses: list[float]
    """Global losses of its first steps."""
    step_s: list[float] = dataclasses.field(default_factory=list)
    """Seconds per global batch, round by round."""
    peak_bytes: list[int] = dataclasses.field(default_factory=list)
    """The most memory that each rank has held; pages that several processes map are shared out among them."""


class ProgramError(Exception):
    """A program ended, or was silent, instead of taking its turn.

    Attributes:
        reason: the last error that its log names, else the log's last line.
    """

    def __init__(self, command: list[str], log: str) -> None:
        super().__init__(f"no turn was taken by {' '.join(command)}\n{log}")
        lines = [line for line in log.splitlines() if line.strip()] or ["nothing in its log"]
        errors = [match[1] for line in lines if (match := _ERROR.match(line))]
        self.reason = (errors or lines)[-1]


class Player:
    """One rank of a program that takes turns. Rank 0 reports."""

    def __init__(self, folder: Path, rank: int, meet: Callable[[], object]) -> None:
        """
        Args:
            meet: returns when all ranks have called it: the clock starts when the last one has seen its turn.
        """
        self._folder, self._rank, self._meet = folder, rank, meet
        self._samples = 0
        self._losses: list[float] = []

    def turns(self) -> Iterator[Turn]:
        """Each turn, when it comes; ends when the measurement does."""
        # The launcher has the pipe open for writing: should it die, reading ends.
        with (self._folder / f"turns-{self._rank}").open() as asked:
            for number, line in enumerate(asked, 1):
                turn = Turn(**json.loads(line))
                self._meet()
                begin_s = time.perf_counter()
                self._samples, self._losses = 0, []
                yield turn
                seconds = time.perf_counter() - begin_s
                _write(self._folder / f"memory-{self._rank}", peak_bytes())
                self._meet()
                if self._rank == 0:
                    memory = [json.loads(path.read_text()) for path in sorted(self._folder.glob("memory-*"))]
                    done = Done(seconds, self._samples, self._losses, memory)
                    _write(self._folder / f"done{number}", dataclasses.asdict(done))

    def stepped(self, samples: int, loss: float | None = None) -> None:
        """One global batch of `samples` was trained on; `loss` is its global mean, where that was asked for."""
        self._samples += samples
        if loss is not None:
            self._losses.append(loss)


class Program:
    """A program under torchrun that trains when it is given a turn."""

    def __init__(
        self, processes: int, command: list[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._number, self._command = folder, 0, command
        self._log = folder / "log"
        self._pipes = []
        for rank in range(processes):
            os.mkfifo(folder / f"turns-{rank}")
            # For reading too, so that opening does not wait for the program.
            self._pipes.append(os.open(folder / f"turns-{rank}", os.O_RDWR))
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # torchrun gives each of several processes one thread; a layout's own number of threads wins over that.
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={processes}", *command, str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def turn(self, steps: int, *, compared: bool = False) -> Done:
        """Let it train for `steps` steps.

        Raises:
            ProgramError: it ended, or took more than five minutes.
        """
        self._number += 1
        line = json.dumps(dataclasses.asdict(Turn(steps, compared))) + "\n"
        for pipe in self._pipes:
            os.write(pipe, line.encode())
        path = self._folder / f"done{self._number}"
        deadline_s = time.monotonic() + _TURN_TIMEOUT_S
        while not path.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                raise ProgramError(self._command, self._log.read_text())
            time.sleep(_POLL_S)
        return Done(**json.loads(path.read_text()))

    def close(self) -> None:
        """End it, and wait until it has."""
        for pipe in self._pipes:
            os.close(pipe)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(timeout=60)


def take_turns(
    ways: Mapping[str, tuple[int, list[str], Mapping[str, str]]],
    rounds: int,
    folder: Path,
    batch_size: int,
    turn_s: float = TURN_S,
) -> tuple[dict[str, Measured], dict[str, ProgramError]]:
    """Seconds per global batch of each way, round by round, in rotating order; and the ways that cannot start.

    Args:
        ways: name -> (processes, command, environment).
        turn_s: about how long a turn takes.

    Raises:
        ProgramError: a program that had started well failed later.
    """
    measured: dict[str, Measured] = {}
    failed: dict[str, ProgramError] = {}
    with contextlib.ExitStack() as stack:
        programs = {}
        for number, (way, (processes, command, environment)) in enumerate(ways.items()):
            programs[way] = Program(processes, command, folder / f"turns-{number}", environment)
            stack.callback(programs[way].close)
        steps = {}
        for way, program in programs.items():
            try:
                measured[way] = Measured(program.turn(COMPARED_STEPS, compared=True).losses)
                steps[way] = _steps_within(program, turn_s)
            except ProgramError as error:
                measured.pop(way, None)
                failed[way] = error
        names = list(measured)
        for number in range(rounds):
            first = number % len(names)
            for way in (*names[first:], *names[:first]):
                done = programs[way].turn(steps[way])
                measured[way].step_s.append(done.seconds * batch_size / done.samples)
                measured[way].peak_bytes = done.peak_bytes
    return measured, failed


def _steps_within(program: Program, turn_s: float) -> int:
    """How many steps fill a turn, once they take as long as they will; quick ones are timed over more of them."""
    steps = WARM_UP_STEPS
    for share in (0.2, 1.0):
        program.turn(steps)
        step_s = program.turn(steps).seconds / steps
        steps = max(1, round(share * turn_s / step_s))
    return steps


def peak_bytes() -> int:
    """The most memory that this process has held, its part of pages that others map too counted as now (Linux)."""
    sizes: dict[str, int] = {}
    for path in ("/proc/self/status", "/proc/self/smaps_rollup"):
        for line in Path(path).read_text().splitlines():
            name, _, value = line.partition(":")
            if name in ("VmHWM", "Rss", "Pss"):
                sizes[name] = int(value.split()[0]) * 1024
    return sizes["VmHWM"] - sizes["Rss"] + sizes["Pss"]


def _write(path: Path, content: object) -> None:
    partial = path.with_name(f"partial-{path.name}")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)
