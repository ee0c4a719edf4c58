"""The run's steps and evaluations as TensorBoard files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

from paceline.report.kinds import EndEvent, EvaluationEvent, NoiseEvent, ShowcaseEvent, StepEvent, decode

_FLUSH_EVERY_S = 5.0


class TensorBoardWriter:
    """Writes `events.out.tfevents.*` into `directory`, event by event."""

    def __init__(self, directory: Path) -> None:
        events_writer, self._event, self._summary, self._text = _load()
        directory.mkdir(parents=True, exist_ok=True)
        self._writer = events_writer(str(directory / "events"))
        self._flushed_s = 0.0
        self._step = 0

    def on_event(self, event: dict[str, Any]) -> None:
        """Take one event of `events.jsonl`; kinds without a curve or text are passed over."""
        read = decode(event)
        if isinstance(read, StepEvent):
            self._step = read.step
            self._write(read.time_s, self._scalars(_step_scalars(read)))
        elif isinstance(read, EvaluationEvent):
            self._step = read.step
            self._write(read.time_s, self._scalars({f"test/{name}": v for name, v in read.metrics.items()}))
        elif isinstance(read, NoiseEvent):
            if read.noise_scale is not None:
                self._write(read.time_s, self._scalars({"train/noise_scale": read.noise_scale}))
        elif isinstance(read, ShowcaseEvent):
            self._write(read.time_s, self._scalars({f"showcase/{n}": v for n, v in read.numbers.items()}))
            for name, told in read.texts.items():
                # TensorBoard reads Markdown: four spaces keep the text as it is
                shown = "\n".join(f"    {line}" for line in told.splitlines())
                self._write(read.time_s, self._text(f"showcase/{name}", shown))
        elif isinstance(read, EndEvent):
            self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _scalars(self, values: dict[str, float]) -> Any:
        return self._summary(value=[self._summary.Value(tag=t, simple_value=v) for t, v in values.items()])

    def _write(self, time_s: float, summary: Any) -> None:
        self._writer.write_event(self._event(wall_time=time_s, step=self._step, summary=summary))
        if abs(time_s - self._flushed_s) > _FLUSH_EVERY_S:
            self._writer.flush()
            self._flushed_s = time_s


def _step_scalars(step: StepEvent) -> dict[str, float]:
    values = {"train/loss": step.loss}
    for group, lr in enumerate(step.lr):
        values["train/lr" if len(step.lr) == 1 else f"train/lr_{group}"] = lr
    if step.grad_norm is not None:
        values["train/grad_norm"] = step.grad_norm
    for part in ("step", "compute", "communication", "data", "optimizer"):
        values[f"time/{part}_s"] = getattr(step, f"{part}_s")
    if step.step_s > 0:
        values["throughput/samples_per_s"] = step.samples / step.step_s
    return values


def _load() -> tuple[Any, Any, Any, Any]:
    """tensorboardX's writer, its `Event` and `Summary` messages, and its maker of text summaries.

    The package's own `__init__` imports torch wherever it is installed. These modules do not: they are
    loaded below an empty package, which is taken away again so that others can load the real one.
    """
    before = sys.modules.get("tensorboardX")
    if before is None:
        spec = importlib.util.find_spec("tensorboardX")
        assert spec is not None, "tensorboardX is a dependency of paceline"
        sys.modules["tensorboardX"] = importlib.util.module_from_spec(spec)
    try:
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2, summary_pb2
    finally:
        if before is None:
            for name in [name for name in sys.modules if name.split(".")[0] == "tensorboardX"]:
                del sys.modules[name]
    return EventsWriter, event_pb2.Event, summary_pb2.Summary, summary.text
