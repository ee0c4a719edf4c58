"""What is kept from one run to the next, in the user's cache: measured profiles, and how good forecasts were."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

VARIABLE = "PACELINE_CACHE"
"""Environment variable: another directory than `paceline` in the user's cache."""
KEPT_FOR_S = 7 * 86400.0
"""A profile that is older is measured again."""
_LAST = 50
_ENOUGH = 5
_FIRST_ERROR = 0.1
"""Where too few are known: with it 81 % of the tried layouts of docs/forecasts.md lay within their error bars."""
_HELD = 2 / 3
"""Of past forecasts, the share that lies within the error."""


def directory() -> Path:
    """Where things are kept; it need not exist yet."""
    given = os.environ.get(VARIABLE)
    if given:
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "paceline"


def key_of(job_file: Path, settings: Mapping[str, Any], *others: Any) -> str:
    """Of a measurement: it changes with the job's file and its options, and with all `others` (JSON)."""
    told = hashlib.sha256(job_file.read_bytes())
    told.update(json.dumps([str(job_file.resolve()), dict(settings), *others], sort_keys=True).encode())
    return told.hexdigest()[:32]


def kept(key: str) -> list[Any] | None:
    """What was kept under a key within the last week; None: nothing, or nothing that can be read."""
    try:
        data = json.loads((directory() / "profiles" / f"{key}.json").read_text())
        return data["values"] if time.time() - data["time"] <= KEPT_FOR_S else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep(key: str, values: Sequence[Any]) -> None:
    """Keep JSON values under a key. Where the cache cannot be written nothing is kept."""
    path = directory() / "profiles" / f"{key}.json"
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(f".{os.getpid()}.partial")
        partial.write_text(json.dumps({"time": time.time(), "values": list(values)}))
        os.replace(partial, path)


def note_forecast(forecast_s: float, measured_s: float, **about: Any) -> None:
    """Add a step's forecast and its measurement to the record, from which later forecasts take their error."""
    line = json.dumps({"time": time.time(), "forecast_s": forecast_s, "measured_s": measured_s, **about})
    with contextlib.suppress(OSError):
        directory().mkdir(parents=True, exist_ok=True)
        with (directory() / "forecasts.jsonl").open("a") as record:
            record.write(line + "\n")


def past_error() -> float:
    """Relative error that holds two thirds of this machine's last forecasts; 0.1 where fewer than five are known."""
    try:
        lines = (directory() / "forecasts.jsonl").read_text().splitlines()[-_LAST:]
        pairs = [(row["forecast_s"], row["measured_s"]) for row in map(json.loads, lines)]
        errors: list[float] = [abs(forecast / measured - 1) for forecast, measured in pairs if measured > 0]
    except (OSError, ValueError, KeyError, TypeError):
        return _FIRST_ERROR
    if len(errors) < _ENOUGH:
        return _FIRST_ERROR
    return sorted(errors)[math.ceil(_HELD * len(errors)) - 1]
