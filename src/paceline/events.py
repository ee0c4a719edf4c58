"""Writing a run's events: one JSON object per line. `docs/events.md` describes every kind."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

SCHEMA = 1
_FLUSH_EVERY_S = 0.2
_FREQUENT = ("step", "noise")


class EventWriter:
    """Appends events to a file; those of every few steps reach the disk within a fifth of a second, others at once."""

    def __init__(self, path: Path) -> None:
        self._file = path.open("a", encoding="utf-8")
        self._flushed_s = 0.0

    def write(self, event: str, **fields: Any) -> None:
        """Append one event. Numbers that are not finite are written as strings, so that the JSON is strict."""
        now_s = time.time()
        record = {"event": event, "time_s": round(now_s, 4), **fields}
        try:
            line = json.dumps(record, allow_nan=False)
        except ValueError:
            line = json.dumps(_strict(record), allow_nan=False)
        self._file.write(line + "\n")
        if event not in _FREQUENT or now_s - self._flushed_s > _FLUSH_EVERY_S:
            self._file.flush()
            self._flushed_s = now_s

    def close(self) -> None:
        self._file.close()


def _strict(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else ("Infinity" if value > 0 else "-Infinity")
    if isinstance(value, dict):
        return {key: _strict(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(item) for item in value]
    return value
