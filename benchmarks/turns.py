"""Taking turns: programs that train one after the other, a second or two each, in one measurement.

A shared machine changes its speed from one minute to the next. Programs that were started together and train
by turns see the same machine; those that wait sleep.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

TURN_S = 1.5
WARM_UP_STEPS = 8
_POLL_S = 0.02
_END = 0
_TURN_TIMEOUT_S = 300.0


class Player:
    """One rank of a program that takes turns. Rank 0 reports."""

    def __init__(self, folder: Path, rank: int, meet: Callable[[], object]) -> None:
        """
        Args:
            meet: returns when all ranks have called it: the clock starts when the last one has seen its turn.
        """
        self._folder, self._rank, self._meet = folder, rank, meet
        self._samples = 0

    def turns(self) -> Iterator[int]:
        """The number of steps of each turn, when it comes; ends when the measurement does."""
        number = 0
        while True:
            number += 1
            steps = self._wait(self._folder / f"turn{number}")
            if steps == _END:
                return
            self._meet()
            begin_s = time.perf_counter()
            self._samples = 0
            yield steps
            seconds = time.perf_counter() - begin_s
            if self._rank == 0:
                _write(self._folder / f"done{number}", {"seconds": seconds, "samples": self._samples})

    def stepped(self, samples: int) -> None:
        """One global batch of `samples` was trained on."""
        self._samples += samples

    def _wait(self, path: Path) -> int:
        parent = os.getppid()
        while not path.exists():
            if os.getppid() != parent:
                return _END  # the launcher has died
            time.sleep(_POLL_S)
        return int(json.loads(path.read_text())["steps"])


class Program:
    """A program under torchrun that trains when it is given a turn."""

    def __init__(
        self, processes: int, command: list[str], folder: Path, environment: Mapping[str, str]
    ) -> None:
        folder.mkdir(parents=True)
        self._folder, self._number, self._command = folder, 0, command
        self._log = folder / "log"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        # torchrun gives each of several processes one thread; a layout's own number of threads wins over that.
        with self._log.open("w") as output:
            self._process = subprocess.Popen(
                [*torchrun, f"--nproc-per-node={processes}", *command, str(folder)],
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
            )

    def turn(self, steps: int) -> tuple[float, int]:
        """Let it train for `steps` steps; the seconds that it took, and the samples."""
        self._ask(steps)
        done = self._folder / f"done{self._number}"
        deadline_s = time.monotonic() + _TURN_TIMEOUT_S
        while not done.exists():
            if self._process.poll() is not None or time.monotonic() > deadline_s:
                sys.exit(f"no turn was taken by {' '.join(self._command)}\n{self._log.read_text()}")
            time.sleep(_POLL_S)
        result = json.loads(done.read_text())
        return result["seconds"], result["samples"]

    def close(self) -> None:
        """End it, and wait until it has."""
        self._ask(_END)
        try:
            self._process.wait(timeout=60)
        except subprocess.TimeoutExpired:
            self._process.terminate()
            self._process.wait(timeout=60)

    def _ask(self, steps: int) -> None:
        self._number += 1
        _write(self._folder / f"turn{self._number}", {"steps": steps})


def take_turns(
    ways: Mapping[str, tuple[int, list[str], Mapping[str, str]]],
    rounds: int,
    folder: Path,
    batch_size: int,
) -> dict[str, list[float]]:
    """Seconds per global batch of each way, round by round; each way follows another equally often.

    Args:
        ways: name -> (processes, command, environment).
    """
    step_s: dict[str, list[float]] = {way: [] for way in ways}
    with contextlib.ExitStack() as stack:
        programs = {}
        for number, (way, (processes, command, environment)) in enumerate(ways.items()):
            programs[way] = Program(processes, command, folder / f"turns-{number}", environment)
            stack.callback(programs[way].close)
        steps = {}
        for way, program in programs.items():
            program.turn(WARM_UP_STEPS)
            seconds, _ = program.turn(WARM_UP_STEPS)
            steps[way] = max(1, round(TURN_S * WARM_UP_STEPS / seconds))
        names = list(ways)
        for number in range(rounds):
            first = number % len(names)
            for way in (*names[first:], *names[:first]):
                seconds, samples = programs[way].turn(steps[way])
                step_s[way].append(seconds * batch_size / samples)
    return step_s


def _write(path: Path, content: Mapping[str, float]) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(content))
    os.replace(partial, path)
