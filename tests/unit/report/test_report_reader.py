from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.errors import RunError
from paceline.events import EventWriter
from paceline.report.reader import follow, read_log

Event = dict[str, Any]


def test_a_finished_run_is_read_whole(write_run: Callable[..., Path]) -> None:
    log = read_log(write_run("finished"))
    assert log.run is not None
    assert log.plan is not None
    assert log.end is not None
    assert log.showcase is not None
    assert (log.name, log.status, log.run.schema_version) == ("shakespeare", "finished", 1)
    assert [trial.label for trial in log.trials][1] == log.plan.label == "2 workers × 1 thread"
    assert (len(log.steps), len(log.evaluations), len(log.messages), len(log.ranks)) == (800, 9, 2, 2)
    assert log.unread == ()


def test_the_number_of_parameters_may_come_with_the_model(
    write_run: Callable[..., Path], run_events: Callable[..., Any]
) -> None:
    events = run_events("one_step")
    assert read_log(write_run(events)).parameters == 4_821_504
    del events[0]["parameters"]
    assert read_log(write_run(events)).parameters is None
    assert (
        read_log(write_run([*events, {"event": "model", "time_s": 1.0, "parameters": 22}])).parameters == 22
    )


def test_a_run_that_goes_on_has_gaps(write_run: Callable[..., Path], run_events: Callable[..., Any]) -> None:
    log = read_log(write_run(run_events("finished")[:21]))
    assert (log.end, log.showcase, log.ranks, log.status) == (None, None, (), "unfinished")
    assert len(log.steps) == 21 - 8


def test_an_empty_file_is_a_run_that_has_said_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text("")
    log = read_log(tmp_path / "events.jsonl")
    assert (log.run, log.plan, log.steps, log.name) == (None, None, (), tmp_path.name)


def test_a_torn_last_line_is_passed_over_and_another_is_reported(write_run: Callable[..., Path]) -> None:
    path = write_run("one_step")
    whole = path.read_text()
    path.write_text(whole + '{"event": "message", "time_')
    assert read_log(path).unread == ()
    path.write_text('{"event": "mess\n' + whole)
    log = read_log(path)
    assert log.end is not None
    assert len(log.unread) == 1
    assert log.unread[0].startswith("line 1: not a JSON object")


def test_unknown_kinds_and_fields_are_ignored(
    write_run: Callable[..., Path], run_events: Callable[..., Any]
) -> None:
    events = run_events("one_step")
    known = read_log(write_run(events))
    for event in events:
        event["mood"] = {"cheerful": True}
    events.insert(3, {"event": "weather", "time_s": 1.0})
    assert read_log(write_run(events)) == known


def test_an_event_that_breaks_the_schema_is_reported_with_its_field(write_run: Callable[..., Path]) -> None:
    path = write_run(
        [{"event": "step", "time_s": 1.0, "step": 1, "samples": 4, "step_s": 0.1, "elapsed_s": 0.1}]
    )
    assert read_log(path).unread == ("line 1: step: loss: Field required",)


def test_numbers_that_are_not_finite_come_back_as_the_writer_wrote_them(tmp_path: Path) -> None:
    writer = EventWriter(tmp_path / "events.jsonl")
    step = {"step": 1, "samples": 4, "step_s": 0.1, "elapsed_s": 0.1, "lr": [0.1, math.nan]}
    writer.write("step", loss=math.nan, grad_norm=math.inf, **step)
    writer.write("evaluation", step=1, metrics={"loss": -math.inf})
    writer.write("message", level="info", text="NaN")
    writer.close()
    log = read_log(tmp_path / "events.jsonl")
    assert math.isnan(log.steps[0].loss)
    assert math.isnan(log.steps[0].lr[1])
    assert log.steps[0].grad_norm == math.inf
    assert log.evaluations[0].metrics["loss"] == -math.inf
    assert log.messages[0].text == "NaN"


def test_a_newer_schema_is_an_error_that_says_what_to_do(
    write_run: Callable[..., Path], run_events: Callable[..., Any]
) -> None:
    events = run_events("one_step")
    events[0]["schema"] = 2
    path = write_run(events)
    with pytest.raises(
        RunError, match="has schema 2; this version of paceline reads up to schema 1"
    ) as error:
        read_log(path)
    assert "update paceline" in error.value.next_step
    with pytest.raises(RunError, match="has schema 2"):
        list(follow(path, threading.Event()))


def test_a_directory_that_is_no_run_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RunError, match=r"cannot read the events of a run at .*: No such file") as error:
        read_log(tmp_path / "events.jsonl")
    assert "paceline train" in error.value.next_step


class _Script(threading.Event):
    """An event whose waits, instead of passing time, do the next thing of a script."""

    def __init__(self, *actions: Callable[[], None]) -> None:
        super().__init__()
        self._actions = list(actions)

    def wait(self, timeout: float | None = None) -> bool:
        self._actions.pop(0)()
        return self.is_set()


def test_follow_yields_whole_lines_as_they_come_until_the_end(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def append(text: str) -> Callable[[], None]:
        def act() -> None:
            with path.open("a") as file:
                file.write(text)

        return act

    script = _Script(
        append('{"event": "run"}\n{"event": "st'),
        append('ep", "step'),
        append('": 1}\nno json\n'),
        append('{"event": "end"}\n{"event": "late"}\n'),
    )
    assert list(follow(path, script)) == [{"event": "run"}, {"event": "step", "step": 1}, {"event": "end"}]


def test_follow_takes_what_is_there_when_told_to_stop(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    stop = _Script()

    def stopped() -> None:
        path.write_text("".join(json.dumps({"event": "step", "step": n}) + "\n" for n in range(3)))
        stop.set()

    stop._actions.append(stopped)
    assert [event["step"] for event in follow(path, stop)] == [0, 1, 2]
    assert list(follow(tmp_path / "none.jsonl", stop)) == []


def test_follow_keeps_up_with_a_real_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"

    def write() -> None:
        writer = EventWriter(path)
        for step in range(500):
            writer.write("step", step=step, loss=1.0)
        writer.write("end", status="finished")
        writer.close()

    thread = threading.Thread(target=write)
    thread.start()
    events = list(follow(path, threading.Event()))
    thread.join()
    assert [event.get("step") for event in events] == [*range(500), None]
