"""Running `paceline` as a user does: a process of its own, with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from preloaded import CONTEXT

from paceline.cli import main

TOY = Path(__file__).parent / "toy.py"
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}


def paceline(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    """`paceline ARGUMENTS`; its process begins with what it imports, as that takes longer than many a command."""
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = CONTEXT.Process(target=_be_the_command, args=(arguments, os.getcwd(), out, err))
        process.start()
        process.join(timeout_s)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(arguments, timeout_s, out.read_text(), err.read_text())
        return subprocess.CompletedProcess(arguments, process.exitcode, out.read_text(), err.read_text())


def _be_the_command(arguments: tuple[str, ...], directory: str, out: Path, err: Path) -> None:
    for path, descriptor in ((out, 1), (err, 2)):
        with path.open("w") as file:
            os.dup2(file.fileno(), descriptor)
    os.chdir(directory)
    os.environ.clear()
    os.environ.update(ENVIRONMENT)
    sys.argv = ["paceline", *arguments]
    main()


def read_events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / "events.jsonl").read_text().splitlines()]


def of_kind(events: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] == kind]


def workers_alive(directory: Path) -> list[int]:
    """Processes whose command line names the run's directory."""
    alive = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "paceline.launch.worker" in command and str(directory) in command:
                alive.append(int(entry.name))
    return alive
