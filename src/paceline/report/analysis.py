"""What the events say about speed: pure arithmetic, nothing is drawn or worded here.

The unit of comparison is the trial with one worker and one thread (one worker, where the device is no
CPU). A *processor* is a core on a CPU, a device elsewhere. All of a job's trials take the same global
batch a step, so times per step compare directly.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

from paceline.report.kinds import TrialEvent
from paceline.report.reader import RunLog

PARTS = ("computation", "communication", "data", "optimizer", "other")
"""The parts of a step, in the order in which they are shown."""


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median over the rounds, and the lowest and highest of them."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))


@dataclasses.dataclass(frozen=True)
class Measured:
    """One layout that was timed."""

    trial: TrialEvent
    processors: int
    """Processors that it keeps busy; never more than there are."""
    step_s: Spread
    samples_per_s: Spread
    speedup: Spread | None
    """Against the unit: ratio of the medians; range of the ratios round by round. None without a unit."""

    @property
    def label(self) -> str:
        return self.trial.label

    @property
    def efficiency(self) -> float | None:
        """Speed-up per processor: 1 is ideal."""
        return None if self.speedup is None else self.speedup.median / self.processors


@dataclasses.dataclass(frozen=True)
class Comparison:
    """All trials of a run side by side."""

    measured: tuple[Measured, ...]
    failed: tuple[TrialEvent, ...]
    unit: Measured | None
    chosen: Measured | None
    processors: int | None
    """Processors of the cluster; None where the run does not say."""

    @property
    def ideal_samples_per_s(self) -> float | None:
        """Every processor as fast as the unit."""
        if self.unit is None or self.processors is None:
            return None
        return self.unit.samples_per_s.median * self.processors


@dataclasses.dataclass(frozen=True)
class Loss:
    """One reason why a step takes longer than the unit's step shared out evenly."""

    part: str
    extra_s: float
    """Seconds per step above the even share; negative where it takes less."""
    missing: float
    """The same in units of speed-up: over all parts they add up to `processors - speedup`."""
    share: float | None
    """Of the step's time this part takes in all; None where it was not measured."""
    slower: float | None = None
    """Computation only: time above its even share, as a share of that."""


@dataclasses.dataclass(frozen=True)
class Breakdown:
    """A layout's step: the unit's step divided by the processors, plus the losses."""

    measured: Measured
    ideal_s: float
    losses: tuple[Loss, ...]

    @property
    def missing(self) -> float:
        return sum(loss.missing for loss in self.losses)


@dataclasses.dataclass(frozen=True)
class RankTime:
    """Where one worker's time goes: seconds per step, on average, for each of `PARTS`."""

    rank: int
    steps: int
    step_s: float
    parts_s: dict[str, float]

    def share(self, part: str) -> float:
        return self.parts_s[part] / self.step_s if self.step_s else 0.0


def compare(log: RunLog) -> Comparison:
    """Put the trials side by side; empty where the layout was given and none was timed."""
    available = _available_processors(log)
    on_cpu = _on_cpu(log)
    timed = [trial for trial in log.trials if trial.step_s]
    unit_trial = next((t for t in timed if t.workers == 1 and (t.threads == 1 or not on_cpu)), None)
    batch_size = log.run.batch_size if log.run else 0

    def measure(trial: TrialEvent) -> Measured:
        used = trial.workers * trial.threads if on_cpu else trial.workers
        step_s = Spread.of(trial.step_s)
        return Measured(
            trial=trial,
            processors=min(used, available) if available else used,
            step_s=step_s,
            samples_per_s=Spread(*(batch_size / s for s in (step_s.median, step_s.high, step_s.low))),
            speedup=_speedup(unit_trial.step_s, trial.step_s) if unit_trial else None,
        )

    measured = tuple(measure(trial) for trial in timed)
    return Comparison(
        measured=measured,
        failed=tuple(trial for trial in log.trials if not trial.step_s),
        unit=next((m for m in measured if m.trial is unit_trial), None),
        chosen=next((m for m in measured if _is_chosen(log, m.trial)), None),
        processors=available,
    )


def break_down(log: RunLog, comparison: Comparison, measured: Measured) -> Breakdown | None:
    """Why `measured` is not as fast as its processors times the unit; None without a unit.

    With T the median time per step and N the processors, `T = T_unit/N + Σ extra`, and the speed-up
    `T_unit/T` misses `N - T_unit/T = N · Σ extra / T`. A part that takes p seconds, and p_unit in the
    unit's step, has `extra = p - p_unit/N`.
    """
    unit = comparison.unit
    if unit is None:
        return None
    n, total_s, unit_s = measured.processors, measured.step_s.median, unit.step_s.median
    parts, unit_parts = _trial_parts(measured.trial), _trial_parts(unit.trial)

    def loss(part: str, extra_s: float, part_s: float | None, slower: float | None = None) -> Loss:
        share = None if part_s is None else part_s / total_s
        return Loss(part, extra_s, n * extra_s / total_s, share, slower)

    if parts is None or unit_parts is None:
        return Breakdown(measured, unit_s / n, (loss("other", total_s - unit_s / n, None),))
    losses = []
    for part in parts:
        even_s = unit_parts[part] / n
        slower = parts[part] / even_s - 1 if part == "computation" and even_s > 0 else None
        losses.append(loss(part, parts[part] - even_s, parts[part], slower))
    rest_s, unit_rest_s = total_s - sum(parts.values()), unit_s - sum(unit_parts.values())
    losses.append(loss("other", rest_s - unit_rest_s / n, rest_s))
    return Breakdown(measured, unit_s / n, tuple(losses))


def rank_times(log: RunLog) -> tuple[RankTime, ...]:
    """Each worker's time per step; rank 0 from its steps where the run did not get as far as `ranks`."""
    if log.ranks:
        return tuple(
            _rank_time(r.rank, r.steps, r.train_s, (r.compute_s, r.communication_s, r.data_s, r.optimizer_s))
            for r in log.ranks
            if r.steps > 0
        )
    if not log.steps:
        return ()
    sums = [
        sum(getattr(step, field) for step in log.steps)
        for field in ("step_s", "compute_s", "communication_s", "data_s", "optimizer_s")
    ]
    return (_rank_time(0, len(log.steps), sums[0], sums[1:]),)


def mean_shares(times: Sequence[RankTime]) -> dict[str, float]:
    """The share of each part in all workers' time; empty without workers."""
    total_s = sum(t.step_s * t.steps for t in times)
    if total_s <= 0:
        return {}
    return {part: sum(t.parts_s[part] * t.steps for t in times) / total_s for part in PARTS}


def samples_per_s(log: RunLog) -> float | None:
    """Samples trained on, per second of training: of the whole run, or so far."""
    if log.end and log.end.samples_per_s is not None:
        return log.end.samples_per_s
    if log.steps and log.steps[-1].elapsed_s > 0:
        return sum(step.samples for step in log.steps) / log.steps[-1].elapsed_s
    return None


def last_metrics(log: RunLog) -> dict[str, float]:
    """The metrics at the end, or of the last evaluation so far."""
    if log.end:
        return log.end.metrics
    return log.evaluations[-1].metrics if log.evaluations else {}


def forecast_and_measured_s(log: RunLog) -> tuple[float | None, float | None]:
    """Seconds per step as forecast and as measured (the median of the run)."""
    forecast = log.end.forecast_step_s if log.end else None
    if forecast is None and log.plan:
        forecast = log.plan.forecast_step_s
    measured = log.end.measured_step_s if log.end else None
    if measured is None and log.steps:
        measured = statistics.median(step.step_s for step in log.steps)
    return forecast, measured


def _speedup(unit_step_s: Sequence[float], step_s: Sequence[float]) -> Spread:
    ratio = statistics.median(unit_step_s) / statistics.median(step_s)
    if len(unit_step_s) == len(step_s):  # rounds are interleaved: a slow moment of the machine hits both
        rounds = [unit / own for unit, own in zip(unit_step_s, step_s, strict=True)]
        low, high = min(rounds), max(rounds)
    else:
        low, high = min(unit_step_s) / max(step_s), max(unit_step_s) / min(step_s)
    return Spread(ratio, min(low, ratio), max(high, ratio))


def _trial_parts(trial: TrialEvent) -> dict[str, float] | None:
    parts = {
        "computation": trial.compute_s,
        "communication": trial.communication_s,
        "data": trial.data_s,
        "optimizer": trial.optimizer_s,
    }
    timed = {part: seconds for part, seconds in parts.items() if seconds is not None}
    return timed if len(timed) == len(parts) else None


def _rank_time(rank: int, steps: int, train_s: float, sums: Sequence[float]) -> RankTime:
    other_s = max(train_s - sum(sums), 0.0)
    parts_s = {part: s / steps for part, s in zip(PARTS, (*sums, other_s), strict=True)}
    return RankTime(rank, steps, sum(parts_s.values()), parts_s)


def _is_chosen(log: RunLog, trial: TrialEvent) -> bool:
    return log.plan is not None and (trial.layout, trial.label) == (log.plan.layout, log.plan.label)


def _on_cpu(log: RunLog) -> bool:
    return log.run is None or all(host.device == "cpu" for host in log.run.cluster.hosts)


def _available_processors(log: RunLog) -> int | None:
    if log.run is None or not log.run.cluster.hosts:
        return None
    return sum(host.cores if host.device == "cpu" else host.workers for host in log.run.cluster.hosts)
