"""Taking turns: programs that train one after the other, a second or two each, in one measurement.

A shared machine changes its speed from one minute to the next. Programs that were started together and train
by turns see the same machine; those that wait sleep.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

_POLL_S = 0.02
_STOP = 0


@dataclasses.dataclass
class Turn:
    """What a program did in its turn."""

    seconds: float
    samples: int
    loss: float


class Player:
    """One rank of a program that takes turns. Rank 0 reports."""

    def __init__(self, folder: Path, rank: int) -> None:
        self._folder, self._rank = folder, rank

    def turns(self) -> Iterator[int]:
        """The number of steps of each turn, when it comes; ends when the measurement does."""
        number = 0
        while True:
            number += 1
            steps = int(_when_there(self._folder / f"turn{number}").read_text())
            if steps == _STOP:
                return
            begin_s = time.perf_counter()
            self._samples, self._losses = 0, []
            yield steps
            seconds = time.perf_counter() - begin_s
            if self._rank == 0:
                result = {"seconds": seconds, "samples": self._samples, "loss": self._losses[-1]}
                _write(self._folder / f"done{number}", json.dumps(result))

    def stepped(self, samples: int, loss: float) -> None:
        """One global batch of `samples` was trained on."""
        self._samples += samples
        self._losses.append(loss)


class Table:
    """The side that gives out the turns of one program."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self._folder, self._number = folder, 0

    def turn(self, steps: int, timeout_s: float = 300.0) -> Turn:
        """Let the program train for `steps` steps."""
        self._ask(steps)
        done = _when_there(self._folder / f"done{self._number}", timeout_s)
        return Turn(**json.loads(done.read_text()))

    def end(self) -> None:
        self._ask(_STOP)

    def _ask(self, steps: int) -> None:
        self._number += 1
        _write(self._folder / f"turn{self._number}", str(steps))


def _write(path: Path, text: str) -> None:
    partial = path.with_suffix(".partial")
    partial.write_text(text)
    os.replace(partial, path)


def _when_there(path: Path, timeout_s: float = 3600.0) -> Path:
    deadline_s = time.monotonic() + timeout_s
    while not path.exists():
        if time.monotonic() > deadline_s:
            raise TimeoutError(f"{path} did not come within {timeout_s:.0f} s")
        time.sleep(_POLL_S)
    return path
