"""The gradient noise scale of a run, and what it makes of the batch size, in words."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from paceline.errors import RunError
from paceline.plan.goal import samples_needed, steps_needed
from paceline.report import formats
from paceline.report.kinds import NoiseEvent
from paceline.report.reader import RunLog, read_log


@dataclasses.dataclass(frozen=True)
class KnownNoise:
    """A noise scale, and where it is from."""

    samples: float
    source: str = ""


def noise_sentence(log: RunLog) -> str:
    """The noise scale, and what the run's batch size makes of it; empty where nothing was measured."""
    noise = log.noise
    if noise is None or log.run is None:
        return ""
    if noise.noise_scale is None:
        return (
            f"The gradient noise scale is not known: in {formats.plural(noise.measurements, 'measurement')} the "
            "gradient is lost in its noise, or the other way round. More steps, or larger batches, would tell."
        )
    batch, scale = log.run.batch_size, noise.noise_scale
    return (
        f"The gradient noise scale, which is the critical batch size, is {in_samples(scale)} ({_interval(noise)}; "
        f"{formats.plural(noise.measurements, 'measurement')}). With batches of {formats.count(batch)}, "
        f"{formats.percent(1 / samples_needed(batch, scale))} of the samples' worth is used: a target takes "
        f"{formats.times(samples_needed(batch, scale))} the fewest samples and "
        f"{formats.times(steps_needed(batch, scale))} the fewest steps. {_twice(batch, scale)}"
    )


def _twice(batch: int, scale: float) -> str:
    steps = steps_needed(2 * batch, scale) / steps_needed(batch, scale)
    samples = samples_needed(2 * batch, scale) / samples_needed(batch, scale)
    return (
        f"Batches of {formats.count(2 * batch)} would take {formats.times(steps)} the steps and "
        f"{formats.times(samples)} the samples."
    )


def known_noise(given: float | Path | None, job_name: str) -> KnownNoise | None:
    """The noise scale that is given, or that the run in a directory has measured.

    Raises:
        RunError: it is no run of this job, or has measured none.
    """
    if given is None or isinstance(given, float):
        return None if given is None else KnownNoise(given)
    log = read_log(given / "events.jsonl")
    if log.run is not None and log.run.name != job_name:
        raise RunError(
            f"{given} has trained {log.run.name!r}, and this is {job_name!r}",
            cause="noise scales of different jobs have nothing in common",
            next_step="give the directory of a run of this job, or --noise-scale with a number",
        )
    if log.noise is None:
        raise RunError(
            f"the run in {given} has measured no gradient noise scale",
            cause="it computed each batch in one piece, or took hardly a step",
            next_step="train with several workers, or with --layout dp_replicate=1,micro=2; or give --noise-scale",
        )
    if log.noise.noise_scale is None:
        raise RunError(
            f"the run in {given} could not tell its gradient noise scale",
            cause=f"in {formats.plural(log.noise.measurements, 'measurement')} the gradient is lost in its noise",
            next_step="train for more steps, or with a larger batch; or give --noise-scale",
        )
    source = f"{_interval(log.noise)}, from {given}, step {formats.count(log.noise.step)}"
    return KnownNoise(log.noise.noise_scale, source)


def in_samples(scale: float) -> str:
    """Three digits: more are not known of a noise scale."""
    return f"{formats.number(float(f'{scale:.3g}'))} samples"


def _interval(noise: NoiseEvent) -> str:
    if noise.low is None or noise.high is None:
        return ""
    low, high = (formats.number(float(f"{value:.2g}")) for value in (noise.low, noise.high))
    return f"95 %: {low} to {high}"
