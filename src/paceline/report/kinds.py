"""The kinds of events in `events.jsonl`, as `docs/events.md` describes them.

Unknown kinds and fields are ignored. The strings `"NaN"`, `"Infinity"` and `"-Infinity"` become floats
in fields that hold numbers, and stay text in fields that hold text.
"""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class _Read(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore")


class Event(_Read):
    """One line of the file."""

    event: str
    time_s: float


class Host(_Read):
    name: str
    device: str
    device_name: str = ""
    cores: int
    memory_bytes: int | None = None
    workers: int


class Cluster(_Read):
    hosts: tuple[Host, ...] = ()


class Until(_Read):
    metric: str
    value: float


class RunEvent(Event):
    schema_version: int = Field(alias="schema")
    name: str
    job_file: str | None = None
    seed: int | None = None
    batch_size: int
    options: dict[str, Any] = {}
    total_steps: int | None = None
    epochs: int | None = None
    until: Until | None = None
    train_samples: int | None = None
    test_samples: int | None = None
    tokens_per_sample: int | None = None
    parameters: int | None = None
    precision: str = ""
    precision_reason: str = ""
    matmul: str = ""
    cluster: Cluster = Cluster()
    versions: dict[str, str] = {}
    command: tuple[str, ...] = ()


class ModelEvent(Event):
    parameters: int


class Trial(_Read):
    """One timed layout."""

    layout: dict[str, Any] = {}
    label: str
    workers: int
    threads: int
    step_s: tuple[float, ...] = ()
    compute_s: float | None = None
    communication_s: float | None = None
    data_s: float | None = None
    optimizer_s: float | None = None
    error: str | None = None


class TrialEvent(Trial, Event):
    pass


class ForecastTold(_Read):
    layout: dict[str, Any] = {}
    terms: dict[str, float] = {}
    memory: dict[str, float] = {}
    samples: int = 0
    error_s: float = 0.0

    @property
    def step_s(self) -> float:
        return sum(self.terms.values())


class ForecastsEvent(Event):
    source: str = ""
    measuring_s: float = 0.0
    possible: int = 0
    forecasts: tuple[ForecastTold, ...] = ()


class PlanEvent(Event):
    layout: dict[str, Any] = {}
    label: str
    reason: str = ""
    chosen_by: str = ""
    forecast_step_s: float | None = None
    planned_step_s: float | None = None
    planned_error_s: float | None = None


class ReplanEvent(Event):
    step: int
    before: dict[str, Any] = Field(default={}, alias="from")
    from_label: str
    to: dict[str, Any] = {}
    to_label: str
    changed: bool
    reason: str = ""
    expected_s: float | None = None
    measured_s: float | None = None
    step_s: float | None = None
    trials: tuple[Trial, ...] = ()
    trial_s: float = 0.0
    move_s: float | None = None
    change_s: float

    def trial_events(self) -> tuple[TrialEvent, ...]:
        """Its trials, as those of a run's beginning are told."""
        own = {"event": "trial", "time_s": self.time_s}
        return tuple(TrialEvent.model_validate(own | trial.model_dump()) for trial in self.trials)


class Difference(_Read):
    kind: str
    name: str = ""
    step: int
    relative_error: float | None = None
    note: str = ""


class ProofEvent(Event):
    status: str
    layout: dict[str, Any] = {}
    steps: int
    samples: int
    compared: int
    worst: tuple[Difference, ...] = ()
    switched_off: tuple[str, ...] = ()
    drawn_at_random: bool = False
    parted: str = ""
    in_float64: tuple[Difference, ...] = ()
    why_not_float64: str = ""
    left_whole: dict[str, str] = {}
    proof_s: float


class StepEvent(Event):
    step: int
    epoch: int = 0
    loss: float
    lr: tuple[float, ...] = ()
    grad_norm: float | None = None
    samples: int
    step_s: float
    compute_s: float = 0.0
    communication_s: float = 0.0
    data_s: float = 0.0
    optimizer_s: float = 0.0
    elapsed_s: float


class NoiseEvent(Event):
    step: int
    samples: int
    parts: int
    squared_gradient: float
    trace: float
    noise_scale: float | None = None
    low: float | None = None
    high: float | None = None
    measurements: int
    every: int
    cost_s: float


class EvaluationEvent(Event):
    step: int
    elapsed_s: float = 0.0
    evaluation_s: float | None = None
    samples: int | None = None
    metrics: dict[str, float]


class MessageEvent(Event):
    level: str
    text: str


class Rank(_Read):
    rank: int
    host: str = ""
    pid: int | None = None
    cores: tuple[int, ...] = ()
    threads: int | None = None
    device: str = ""
    steps: int
    train_s: float
    compute_s: float = 0.0
    communication_s: float = 0.0
    data_s: float = 0.0
    optimizer_s: float = 0.0
    peak_memory_bytes: int | None = None


class RanksEvent(Event):
    ranks: tuple[Rank, ...] = ()


class ShowcaseEvent(Event):
    texts: dict[str, str] = {}
    numbers: dict[str, float] = {}


class EndEvent(Event):
    status: str
    steps: int = 0
    train_s: float = 0.0
    evaluation_s: float = 0.0
    total_s: float = 0.0
    samples: int = 0
    samples_per_s: float | None = None
    metrics: dict[str, float] = {}
    weights: str | None = None
    forecast_step_s: float | None = None
    planned_step_s: float | None = None
    planned_error_s: float | None = None
    measured_step_s: float | None = None
    error: str | None = None


KINDS: dict[str, type[Event]] = {
    "run": RunEvent,
    "model": ModelEvent,
    "forecasts": ForecastsEvent,
    "trial": TrialEvent,
    "plan": PlanEvent,
    "proof": ProofEvent,
    "step": StepEvent,
    "noise": NoiseEvent,
    "replan": ReplanEvent,
    "evaluation": EvaluationEvent,
    "message": MessageEvent,
    "ranks": RanksEvent,
    "showcase": ShowcaseEvent,
    "end": EndEvent,
}


def decode(event: dict[str, Any]) -> Event | None:
    """The event as a typed record; None for a kind that this version does not know.

    Raises:
        pydantic.ValidationError: a known kind that lacks a field or has one of another type.
    """
    kind = KINDS.get(str(event.get("event")))
    return None if kind is None else kind.model_validate(event)
