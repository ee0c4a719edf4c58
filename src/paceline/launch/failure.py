"""How a worker's error reaches the user: a small JSON file per rank, read by the launcher."""

from __future__ import annotations

import json
import os
import signal
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from paceline.errors import CollectiveError, PacelineError, WorkerError

_TO_SAVE_MEMORY = "use a smaller batch, more micro-batches, or fewer workers"


def record(directory: Path, rank: int, error: BaseException) -> PacelineError:
    """Write what failed on this rank into the run's directory; return it as an error of our own tree."""
    ours = error if isinstance(error, PacelineError) else _as_worker_error(rank, error)
    folder = directory / "errors"
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "rank": rank,
        "time_s": time.time(),
        "kind": type(ours).__name__,
        "what": ours.what,
        "cause": ours.cause,
        "next_step": ours.next_step,
        "lost_a_peer": isinstance(ours, CollectiveError) and not ours.timed_out,
        "timed_out": isinstance(ours, CollectiveError) and ours.timed_out,
        "traceback": "".join(traceback.format_exception(error)),
    }
    partial = folder / f"rank{rank}.partial"
    partial.write_text(json.dumps(content, indent=2))
    os.replace(partial, folder / f"rank{rank}.json")
    return ours


def first_failure(directory: Path, exit_codes: Mapping[int, int]) -> PacelineError:
    """The error to show: what failed first, not what others felt of it.

    Args:
        exit_codes: of the workers that failed, by rank, as the agent saw them first; negative: a signal.
    """
    recorded = [json.loads(p.read_text()) for p in sorted((directory / "errors").glob("rank*.json"))]
    words = {r["rank"] for r in recorded}
    causes = [r for r in recorded if not r["lost_a_peer"] and not r["timed_out"]]
    timed_out = [r for r in recorded if r["timed_out"]]
    killed = {rank: -code for rank, code in exit_codes.items() if code < 0 and -code != signal.SIGTERM}
    silent = {rank: code for rank, code in exit_codes.items() if code > 0 and rank not in words}
    if causes:
        return _rebuild(min(causes, key=lambda r: r["time_s"]), directory)
    if timed_out:
        # Those that the agent had to kill afterwards are the ones that did not answer.
        first = min(timed_out, key=lambda r: r["time_s"])
        hung = f"; silent: rank {', '.join(map(str, sorted(killed)))}" if killed else ""
        return _rebuild({**first, "cause": first["cause"] + hung}, directory)
    if killed:
        rank, number = min(killed.items())
        return WorkerError(
            rank,
            f"rank {rank} was killed by {_signal_name(number)}",
            cause="it may have run out of memory" if number == signal.SIGKILL else "a crash in native code",
            next_step=_TO_SAVE_MEMORY
            if number == signal.SIGKILL
            else f"see the end of its log in {directory / 'logs'}",
        )
    if silent:
        rank, code = min(silent.items())
        return WorkerError(
            rank,
            f"rank {rank} ended with exit status {code} and no word of why",
            cause="sys.exit() in the job, or a failure while it was starting",
            next_step=f"see the end of its log in {directory / 'logs'}",
        )
    if recorded:
        return _rebuild(min(recorded, key=lambda r: r["time_s"]), directory)
    return WorkerError(
        -1, "a worker failed without a word", next_step=f"see the logs in {directory / 'logs'}"
    )


def _rebuild(content: Mapping[str, Any], directory: Path) -> PacelineError:
    rank, what = content["rank"], content["what"]
    # Errors of the job are the same on every rank; those of a worker name it already.
    where = "" if f"rank {rank}" in what else f"rank {rank}: "
    return WorkerError(
        rank,
        f"{where}{what}",
        cause=content["cause"],
        next_step=content["next_step"] or f"the traceback is in {directory / 'errors' / f'rank{rank}.json'}",
    )


def _as_worker_error(rank: int, error: BaseException) -> WorkerError:
    frames = traceback.extract_tb(error.__traceback__)
    ours = str(Path(__file__).parents[1])
    theirs = [f for f in frames if not f.filename.startswith(ours) and "site-packages" not in f.filename]
    theirs = [f for f in theirs if not f.filename.startswith("<")]
    where = f" ({Path(theirs[-1].filename).name}, line {theirs[-1].lineno})" if theirs else ""
    out_of_memory = (
        isinstance(error, MemoryError)
        or "out of memory" in str(error).lower()
        or "can't allocate" in str(error)
    )
    during = "".join(f", {note}" for note in getattr(error, "__notes__", ()))
    return WorkerError(
        rank,
        f"rank {rank} raised {type(error).__name__}: {error}{where}{during}",
        cause="not enough memory" if out_of_memory else "an error in the job's own code" if theirs else "",
        next_step=_TO_SAVE_MEMORY if out_of_memory else "",
    )


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
