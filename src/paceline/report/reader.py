"""Reading `events.jsonl`: all of it at once (`read_log`), or as it grows (`follow`)."""

from __future__ import annotations

import dataclasses
import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from pydantic import ValidationError

from paceline.errors import RunError
from paceline.events import SCHEMA
from paceline.report.kinds import (
    EndEvent,
    EvaluationEvent,
    Event,
    ForecastsEvent,
    MessageEvent,
    ModelEvent,
    NoiseEvent,
    PlanEvent,
    ProofEvent,
    Rank,
    RanksEvent,
    ReplanEvent,
    RunEvent,
    ShowcaseEvent,
    StepEvent,
    TrialEvent,
    decode,
)

_POLL_S = 0.2
_E = TypeVar("_E", bound=Event)


@dataclasses.dataclass(frozen=True)
class RunLog:
    """All that a run has written. What it has not (yet) written is None or empty."""

    path: Path
    run: RunEvent | None = None
    model: ModelEvent | None = None
    forecasts: ForecastsEvent | None = None
    trials: tuple[TrialEvent, ...] = ()
    """Those by which the present layout was chosen: of the last change, where there was one."""
    plan: PlanEvent | None = None
    proof: ProofEvent | None = None
    steps: tuple[StepEvent, ...] = ()
    noise: NoiseEvent | None = None
    """The last one: of all steps until then."""
    replans: tuple[ReplanEvent, ...] = ()
    evaluations: tuple[EvaluationEvent, ...] = ()
    messages: tuple[MessageEvent, ...] = ()
    ranks: tuple[Rank, ...] = ()
    showcase: ShowcaseEvent | None = None
    end: EndEvent | None = None
    unread: tuple[str, ...] = ()
    """Lines that could not be understood, each with the reason; a torn last line is not among them."""

    @property
    def directory(self) -> Path:
        return self.path.parent

    @property
    def name(self) -> str:
        return self.run.name if self.run else self.directory.name

    @property
    def parameters(self) -> int | None:
        """Of the model, as told by `model` or else by `run`."""
        if self.model:
            return self.model.parameters
        return self.run.parameters if self.run else None

    @property
    def status(self) -> str:
        """The status at the end, or `unfinished`: still going, or died without a word."""
        return self.end.status if self.end else "unfinished"


def read_log(path: Path) -> RunLog:
    """Read the events in the file `path`.

    Raises:
        RunError: there is no such file, or a newer version of paceline wrote it.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise RunError(
            f"cannot read the events of a run at {path}: {error.strerror}",
            cause="the directory is not that of a run, or the run ended before its first event",
            next_step="give the directory that `paceline train` printed at its end",
        ) from error
    events: list[Event] = []
    unread: list[str] = []
    lines = data.split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            raw = _parse(line, path)
            event = decode(raw)
        except ValidationError as error:
            unread.append(f"line {number}: {_first_problem(raw, error)}")
            continue
        except ValueError as error:
            if number < len(lines):  # the last line may be torn: the run is still writing it, or died
                unread.append(f"line {number}: not a JSON object ({error})")
            continue
        if event is not None:
            events.append(event)
    replans = _all(events, ReplanEvent)
    changes = [event for event in replans if event.changed]
    return RunLog(
        path=path,
        run=_last(events, RunEvent),
        model=_last(events, ModelEvent),
        forecasts=_last(events, ForecastsEvent),
        trials=changes[-1].trial_events() if changes else _all(events, TrialEvent),
        plan=_last(events, PlanEvent),
        proof=_last(events, ProofEvent),
        steps=_all(events, StepEvent),
        noise=_last(events, NoiseEvent),
        replans=replans,
        evaluations=_all(events, EvaluationEvent),
        messages=_all(events, MessageEvent),
        ranks=ranks.ranks if (ranks := _last(events, RanksEvent)) else (),
        showcase=_last(events, ShowcaseEvent),
        end=_last(events, EndEvent),
        unread=tuple(unread),
    )


def follow(path: Path, stop: threading.Event) -> Iterator[dict[str, Any]]:
    """Yield the events of the file `path` as they are written, from its first line on.

    Waits for the file to appear. Ends after the `end` event; or, once `stop` is set, after what is
    there by then. Lines that are no JSON objects are passed over (`read_log` counts them).

    Raises:
        RunError: a newer version of paceline wrote the file.
    """
    position, pending = 0, b""
    while True:
        stopping = stop.is_set()  # before reading: what was written before `stop` is not missed
        if path.exists():
            with path.open("rb") as file:
                file.seek(position)
                data = file.read()
            position += len(data)
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                try:
                    event = _parse(line, path)
                except ValueError:
                    continue
                yield event
                if event.get("event") == "end":
                    return
        if stopping:
            return
        stop.wait(_POLL_S)


def _parse(line: bytes, path: Path) -> dict[str, Any]:
    event = json.loads(line)
    if not isinstance(event, dict):
        raise ValueError(f"it is a {type(event).__name__}")
    schema = event.get("schema")
    if event.get("event") == "run" and isinstance(schema, int) and schema > SCHEMA:
        raise RunError(
            f"{path} has schema {schema}; this version of paceline reads up to schema {SCHEMA}",
            cause="a newer version of paceline wrote it",
            next_step="update paceline (pip install --upgrade paceline) and try again",
        )
    return event


def _first_problem(raw: dict[str, Any], error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    return f"{raw.get('event')}: {field}: {problem['msg']}"


def _all(events: list[Event], kind: type[_E]) -> tuple[_E, ...]:
    return tuple(event for event in events if isinstance(event, kind))


def _last(events: list[Event], kind: type[_E]) -> _E | None:
    return next((event for event in reversed(events) if isinstance(event, kind)), None)
