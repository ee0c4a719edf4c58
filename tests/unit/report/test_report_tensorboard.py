from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.report.tensorboard import TensorBoardWriter, _load


def _read(directory: Path) -> list[Any]:
    """The events of the only file in `directory`: length, its checksum, event, its checksum."""
    _, event_type, _, _ = _load()
    (path,) = directory.iterdir()
    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        (length,) = struct.unpack("<Q", data[at : at + 8])
        events.append(event_type.FromString(data[at + 12 : at + 12 + length]))
        at += 12 + length + 4
    return events


def _write(directory: Path, events: list[dict[str, Any]]) -> list[Any]:
    writer = TensorBoardWriter(directory)
    for event in events:
        writer.on_event(event)
    writer.close()
    return _read(directory)


def _scalars(events: list[Any], tag: str) -> list[tuple[int, float]]:
    return [(e.step, v.simple_value) for e in events for v in e.summary.value if v.tag == tag]


def test_steps_evaluations_and_showcase_are_read_back(tmp_path: Path, run_events: Callable[..., Any]) -> None:
    source = run_events("finished")
    events = _write(tmp_path / "tensorboard", source)
    assert events[0].file_version == "brain.Event:2"
    steps = [event for event in source if event["event"] == "step"]
    assert [step for step, _ in _scalars(events, "train/loss")] == list(range(1, 801))
    assert [value for _, value in _scalars(events, "train/loss")] == pytest.approx([s["loss"] for s in steps])
    assert _scalars(events, "train/lr")[0] == (1, pytest.approx(3e-4))
    assert _scalars(events, "train/grad_norm")[0] == (1, pytest.approx(0.8))
    for part in ("step", "compute", "communication", "data", "optimizer"):
        assert _scalars(events, f"time/{part}_s")[9][1] == pytest.approx(steps[9][f"{part}_s"])
    assert _scalars(events, "throughput/samples_per_s")[9][1] == pytest.approx(64 / steps[9]["step_s"])
    assert [step for step, _ in _scalars(events, "test/accuracy")] == list(range(0, 801, 100))
    assert _scalars(events, "showcase/distinct_words") == [(800, pytest.approx(0.731))]
    texts = [v for e in events for v in e.summary.value if v.tag == "showcase/sample/text_summary"]
    assert b"    KING.\n      What say you" in texts[0].tensor.string_val[0]
    assert events[1].wall_time == pytest.approx(source[5]["time_s"])


def test_values_that_are_not_finite_and_several_learning_rates(
    tmp_path: Path, run_events: Callable[..., Any]
) -> None:
    source = run_events("not_finite")
    for event in source:
        if event["event"] == "step":
            event["lr"], event["grad_norm"] = [0.1, 0.2], None
    events = _write(tmp_path / "tensorboard", source)
    losses = dict(_scalars(events, "train/loss"))
    assert losses[60] == losses[60]
    assert losses[61] != losses[61]
    assert _scalars(events, "train/lr_1")[0] == (1, pytest.approx(0.2))
    assert _scalars(events, "train/grad_norm") == []


def test_tensorboardx_itself_can_still_be_loaded(tmp_path: Path) -> None:
    TensorBoardWriter(tmp_path / "own").close()
    from tensorboardX import SummaryWriter

    with SummaryWriter(str(tmp_path / "real")) as writer:
        writer.add_scalar("loss", 0.5, 3)
    assert _scalars(_read(tmp_path / "real"), "loss") == [(3, 0.5)]
    again = TensorBoardWriter(tmp_path / "again")
    again.close()
    assert [event.file_version for event in _read(tmp_path / "again")] == ["brain.Event:2"]
