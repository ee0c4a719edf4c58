"""Processes on the hosts of a box: started together, their output collected, ended together."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import IO

from box_limits import BoxError, ControlGroup

_POLL_S = 0.02
_GRACE_S = 10.0
"""After the first failure, for the others to say what they felt."""
_END_S = 5.0
"""From SIGTERM to SIGKILL."""
_LAST_LINES = 12
TIMED_OUT = 124
"""Exit code of what took too long, as that of the program `timeout`."""


@dataclasses.dataclass(frozen=True)
class Start:
    """What is started on a host."""

    host: int
    command: Sequence[str]
    environment: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Ended:
    """What became of it."""

    host: int
    exit_code: int
    """0 where it did what it should; 128 and a signal's number where one has killed it."""
    stdout: str
    stderr: str
    timed_out: bool
    killed_for_memory: bool
    """The kernel has killed a process of this host, as it would not fit."""

    @property
    def failure(self) -> str:
        """What went wrong, in words; nothing where nothing did."""
        if self.timed_out:
            return "did not end in time"
        if self.exit_code == 0:
            return ""
        return f"ended with exit code {self.exit_code}" + (
            ", after the kernel had killed a process for want of memory" if self.killed_for_memory else ""
        )


Tell = Callable[[Start, str, bool], None]
"""Called with who wrote a line, the line, and whether to standard error; from several threads at once."""


def require_success(ended: Sequence[Ended]) -> None:
    """Raise `BoxError` with the last lines of the first that failed, if one did."""
    for end in ended:
        if end.failure:
            last = (end.stderr.strip() or end.stdout.strip()).splitlines()[-_LAST_LINES:]
            raise BoxError(f"host {end.host} {end.failure}", cause="\n".join(last))


def carry_out(
    starts: Sequence[Start],
    groups: Sequence[ControlGroup],
    timeout_s: float,
    tell: Tell | None = None,
) -> list[Ended]:
    """Start all at once, and return when all have ended; nothing that they have started remains.

    Args:
        groups: of each host, what its processes are in.
        timeout_s: after it they are sent SIGTERM, and SIGKILL some seconds later; likewise after one has failed.
    """
    killed = [group.num_killed_for_memory() for group in groups]
    running: list[_Running] = []
    timed_out = False
    try:
        try:
            for start in starts:
                # One by one: those that were started are ended also where the next one cannot be.
                running.append(_Running(start, tell))  # noqa: PERF401
            timed_out = not _wait(running, timeout_s)
        finally:
            _end(running)
    finally:
        for group in groups:
            group.kill_all()
        for one in running:
            one.close()
    found = []
    for one in running:
        host, code = one.start.host, one.exit_code
        found.append(
            Ended(
                host=host,
                exit_code=TIMED_OUT if timed_out and one.was_ended else code,
                stdout="".join(one.stdout),
                stderr="".join(one.stderr),
                timed_out=timed_out and one.was_ended,
                killed_for_memory=groups[host].num_killed_for_memory() > killed[host],
            )
        )
    return found


class _Running:
    """A process, and two threads that read what it writes."""

    def __init__(self, start: Start, tell: Tell | None) -> None:
        self.start = start
        self.was_ended = False
        """By us."""
        self.stdout: list[str] = []
        self.stderr: list[str] = []
        self._process = subprocess.Popen(
            list(start.command),
            env=dict(start.environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._readers = [
            threading.Thread(target=self._read, args=(stream, lines, is_error, tell), daemon=True)
            for stream, lines, is_error in (
                (self._process.stdout, self.stdout, False),
                (self._process.stderr, self.stderr, True),
            )
        ]
        for reader in self._readers:
            reader.start()

    def _read(self, stream: IO[str], lines: list[str], is_error: bool, tell: Tell | None) -> None:
        for line in stream:
            lines.append(line)
            if tell is not None:
                tell(self.start, line.rstrip("\n"), is_error)

    @property
    def exit_code(self) -> int | None:
        code = self._process.poll()
        return code if code is None or code >= 0 else 128 - code

    def send(self, number: signal.Signals) -> None:
        """To it and all that are in its session's first group."""
        if self.exit_code is None:
            self.was_ended = True
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)

    def close(self) -> None:
        """Once nothing lives that could hold its output open."""
        self._process.wait()
        for reader in self._readers:
            reader.join(timeout=10)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()


def _wait(running: Sequence[_Running], timeout_s: float) -> bool:
    """Whether all ended, or one failed and had its grace, before the time was over."""
    end_s = time.monotonic() + timeout_s
    failed_s: float | None = None
    for now_s in _ticks():
        codes = [one.exit_code for one in running]
        if None not in codes:
            return True
        if failed_s is None and any(codes):
            failed_s = now_s
        if failed_s is not None and now_s > failed_s + _GRACE_S:
            return True
        if now_s > end_s:
            return False
    raise AssertionError("time does not end")


def _end(running: Sequence[_Running]) -> None:
    """SIGTERM, time to heed it, SIGKILL."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        for one in running:
            one.send(number)
        end_s = time.monotonic() + _END_S
        for now_s in _ticks():
            if now_s > end_s or all(one.exit_code is not None for one in running):
                break


def _ticks() -> Iterator[float]:
    while True:
        yield time.monotonic()
        time.sleep(_POLL_S)
