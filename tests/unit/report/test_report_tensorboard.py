from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paceline.report.tensorboard import TensorBoardWriter


def _read(directory: Path) -> list[Any]:
    """The events of the only file in `directory`, its checksums verified."""
    from tensorboardX.proto.event_pb2 import Event
    from tensorboardX.record_writer import masked_crc32c

    (path,) = directory.iterdir()
    data, events, at = path.read_bytes(), [], 0
    while at < len(data):
        head, body_at = data[at : at + 8], at + 12
        (length,) = struct.unpack("<Q", head)
        body = data[body_at : body_at + length]
        assert struct.unpack("<I", data[at + 8 : body_at])[0] == masked_crc32c(head)
        assert struct.unpack("<I", data[body_at + length : body_at + length + 4])[0] == masked_crc32c(body)
        events.append(Event.FromString(body))
        at = body_at + length + 4
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
    assert losses[60] == losses[60] and losses[61] != losses[61]
    assert _scalars(events, "train/lr_1")[0] == (1, pytest.approx(0.2))
    assert _scalars(events, "train/grad_norm") == []
