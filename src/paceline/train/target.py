"""When a training ends: after so many steps, or when a held-out metric reaches a target."""

from __future__ import annotations

import dataclasses
import math
from typing import Self

from paceline.errors import RunError
from paceline.job import Job


@dataclasses.dataclass(frozen=True)
class Target:
    """`metric=value`: reached when the held-out metric crosses the value from where it began.

    A metric that starts below the value has to rise to it, one that starts above has to fall: so
    `loss=1.5` and `accuracy=0.97` both mean what they say.
    """

    metric: str
    value: float

    @classmethod
    def parse(cls, text: str, job: Job) -> Self:
        """Read `"accuracy=0.97"`.

        Raises:
            RunError: no such metric, or no number.
        """
        name, equals, number = (part.strip() for part in text.partition("="))
        known = ["loss", *job.metrics]
        if name not in known:
            raise RunError(
                f"--until {text!r}: the job has no metric {name!r}",
                next_step=f"its held-out metrics are: {', '.join(known)}",
            )
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not equals or not math.isfinite(value):
            raise RunError(f"--until {text!r} has no number", next_step=f"write it like {name}=0.5")
        return cls(name, value)

    def reached(self, first: float, now: float) -> bool:
        """Whether the metric, which began at `first`, has reached the value with `now`."""
        return now >= self.value if first < self.value else now <= self.value


@dataclasses.dataclass(frozen=True)
class Length:
    """How long a run is: `steps` in all (None: until the data of `epochs` ends)."""

    steps: int | None
    epochs: int | None


def plan_length(job: Job, *, steps: int | None, epochs: int | None, batches_per_epoch: int | None) -> Length:
    """The run's length: the command line wins over the job, `steps` over `epochs`.

    Raises:
        RunError: nothing says how long, or a length below one.
    """
    for name, value in (("--steps", steps), ("--epochs", epochs)):
        if value is not None and value < 1:
            raise RunError(f"{name} is {value}", next_step="give a whole number of at least 1")
    if steps is None and epochs is None:
        steps, epochs = job.steps, job.epochs
    if steps is not None:
        return Length(steps, None)
    if epochs is None:
        raise RunError(
            "the training has no length",
            cause="neither the job nor the command line gives one",
            next_step="give --steps or --epochs",
        )
    return Length(None if batches_per_epoch is None else epochs * batches_per_epoch, epochs)
