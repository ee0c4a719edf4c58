"""Running `paceline` as a user does: a process of its own, with a time limit."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

TOY = Path(__file__).parent / "toy.py"
ENVIRONMENT = {**os.environ, "COLUMNS": "160", "NO_COLOR": "1"}


def paceline(*arguments: str, timeout_s: float = 120) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline", *arguments],
        capture_output=True,
        text=True,
        timeout=timeout_s,
        env=ENVIRONMENT,
        check=False,
    )


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
