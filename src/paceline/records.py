"""What passes from one stage to the next: frozen, validated when built, JSON both ways."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from paceline.errors import LayoutError

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "ep", "tp")
"""The mesh axes, outermost first, by the ecosystem's names."""

SUPPORTED_AXES = frozenset({"pp", "dp_replicate", "dp_shard", "tp"})
"""Axes that may be larger than one today."""

SCHEDULE_NAMES = ("gpipe", "1f1b", "interleaved", "bfs", "zb-h1", "zbv")
"""Orders of a pipeline's work, made in `paceline.plan.schedules`."""

RECOMPUTE = ("none", "selective", "full")
"""What a backward pass computes again: nothing; all but products of matrices; all of each piece."""
SEQUENCE = ("auto", "off", "on")
"""Whether tensor parallelism divides what is between its layers along positions: sequence parallelism."""


class Record(BaseModel):
    """Base of all records."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        return self.model_dump(mode="json")

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Self:
        return cls.model_validate(data)

    def model_copy(self, *, update: Mapping[str, Any] | None = None, deep: bool = False) -> Self:
        """A copy with other values in some fields; what was computed from the old ones is left behind."""
        copy = super().model_copy(update=update, deep=deep)
        for name in set(copy.__dict__) - set(type(self).model_fields):
            del copy.__dict__[name]
        return copy


class Host(Record):
    """One machine: how many workers it may carry, and on what."""

    name: str
    device: str
    """`cpu` or `cuda`."""
    device_name: str
    cores: int = Field(ge=1)
    memory_bytes: int = Field(ge=0)
    workers: int = Field(ge=1)
    """Workers started here."""


class Cluster(Record):
    """What a run is given: its hosts, in the order of the workers' ranks."""

    hosts: tuple[Host, ...] = Field(min_length=1)

    @property
    def workers(self) -> int:
        return sum(host.workers for host in self.hosts)

    @property
    def device(self) -> str:
        return self.hosts[0].device


class Layout(Record):
    """How a job is split: a size for each axis, micro-batches, threads of each worker."""

    pp: int = Field(default=1, ge=1)
    dp_replicate: int = Field(default=1, ge=1)
    dp_shard: int = Field(default=1, ge=1)
    cp: int = Field(default=1, ge=1)
    ep: int = Field(default=1, ge=1)
    tp: int = Field(default=1, ge=1)
    micro: int = Field(default=1, ge=1)
    """Micro-batches in a step: gradients are accumulated over them."""
    schedule: str = "1f1b"
    """Order of a pipeline's work: one of `paceline.plan.schedules.SCHEDULES`."""
    stages: int | None = Field(default=None, ge=1)
    """Pipeline stages of each worker; None: as many as the schedule is made for."""
    zero: int | None = Field(default=None, ge=1, le=3)
    """What `dp_shard` shards: 1 the optimizer's state, 2 gradients too, 3 parameters too; None: `zero_stage`."""
    recompute: Literal["none", "selective", "full"] = "none"
    """One of `RECOMPUTE`."""
    sequence: Literal["auto", "off", "on"] = "auto"
    """One of `SEQUENCE`; `auto`: where it saves memory and exchanges no more."""
    threads: int | None = Field(default=None, ge=1)
    """Threads of each worker; None shares out the host's cores."""

    @property
    def workers(self) -> int:
        """The product of all axes."""
        return self.pp * self.dp_replicate * self.dp_shard * self.cp * self.ep * self.tp

    @property
    def splits_model(self) -> bool:
        """Whether a worker has less than the whole, plain model: a part of it, or one that is recomputed."""
        return self.pp * self.tp * self.dp_shard > 1 or self.recompute != "none"

    @property
    def zero_stage(self) -> int:
        """`zero`, or what stands for None: a pipeline's worker runs each of its blocks many times in a step."""
        return self.zero or (2 if self.pp > 1 else 3)

    @property
    def keeps_gradients(self) -> bool:
        """Whether a worker among `dp_shard` has the gradients of all of its blocks until the end of a step.

        In a pipeline those of weights that several stages have in common are added up over the stages first.
        """
        return self.zero_stage < (3 if self.pp > 1 else 2)

    @property
    def data_parallel(self) -> int:
        """Among how many workers a micro-batch is split."""
        return self.dp_replicate * self.dp_shard

    def __str__(self) -> str:
        """The text that `parse` reads; a single process is `dp_replicate=1`."""
        parts = [f"{axis}={getattr(self, axis)}" for axis in AXES if getattr(self, axis) > 1]
        parts = parts or ["dp_replicate=1"]
        if self.micro > 1:
            parts.append(f"micro={self.micro}")
        if self.pp > 1 and self.schedule != "1f1b":
            parts.append(f"schedule={self.schedule}")
        if self.stages is not None:
            parts.append(f"stages={self.stages}")
        if self.zero is not None:
            parts.append(f"zero={self.zero}")
        if self.recompute != "none":
            parts.append(f"recompute={self.recompute}")
        if self.sequence != "auto":
            parts.append(f"sequence={self.sequence}")
        if self.threads is not None:
            parts.append(f"threads={self.threads}")
        return ",".join(parts)

    @classmethod
    def parse(cls, text: str) -> Layout:
        """Read `"dp_replicate=2,micro=4"`.

        Raises:
            LayoutError: an unknown key, a size that is no whole number of at least 1, or an axis
                that this version cannot split along.
        """
        values: dict[str, int | str] = {}
        for part in filter(None, (p.strip() for p in text.split(","))):
            key, _, value = (p.strip() for p in part.partition("="))
            if key not in cls.model_fields:
                near = difflib.get_close_matches(key, cls.model_fields, n=1)
                raise LayoutError(
                    f"layout {text!r} has an unknown key {key!r}",
                    cause=f"perhaps {near[0]!r} was meant" if near else "",
                    next_step=f"keys are {', '.join(cls.model_fields)}; or `auto`",
                )
            if key in values:
                raise LayoutError(f"layout {text!r} gives {key!r} twice", next_step="give each key once")
            values[key] = _read_name(text, key, value) if key in _NAMED else _read_size(text, key, value)
        if not values:
            raise LayoutError(
                f"layout {text!r} is empty", next_step="give `auto`, or axis sizes such as `dp_replicate=2`"
            )
        for axis in AXES:
            if axis not in SUPPORTED_AXES and values.get(axis, 1) != 1:
                raise LayoutError(
                    f"layout {text!r}: {axis}={values[axis]} cannot be trained by this version",
                    cause=f"it splits along {', '.join(a for a in AXES if a in SUPPORTED_AXES)}",
                    next_step=f"use dp_shard={values[axis]}, or `auto`",
                )
        for key, axis in (("schedule", "pp"), ("stages", "pp"), ("zero", "dp_shard"), ("sequence", "tp")):
            if key in values and values.get(axis, 1) == 1:
                raise LayoutError(
                    f"layout {text!r} gives {key}, and {axis} is 1",
                    next_step=f"give {axis} a size of at least 2, or leave {key} out",
                )
        if values.get("zero") == 3 and values.get("pp", 1) != 1:
            raise LayoutError(
                f"layout {text!r}: zero=3 in a pipeline",
                cause="its blocks run many times in a step, and would be gathered each time",
                next_step="use zero=2, or leave zero out",
            )
        if str(values.get("schedule", "")).startswith("zb") and values.get("recompute", "none") != "none":
            raise LayoutError(
                f"layout {text!r}: schedule={values['schedule']} with recompute={values['recompute']}",
                cause="the backward pass in two parts needs what the forward pass has kept",
                next_step="leave recompute out, or use schedule=1f1b",
            )
        try:
            return cls(**values)  # type: ignore[arg-type]
        except ValidationError as error:
            first = error.errors()[0]
            raise LayoutError(
                f"layout {text!r}: {first['loc'][0]} is {first['input']!r}",
                cause=first["msg"],
                next_step=f"give {first['loc'][0]} another value, or leave it out",
            ) from error

    def check_batch(self, batch_size: int) -> None:
        """Raise `LayoutError` where a global batch of `batch_size` samples cannot be divided evenly."""
        parts = self.data_parallel * self.micro
        if batch_size % parts == 0:
            return
        below, above = batch_size // parts * parts, (batch_size // parts + 1) * parts
        nearest = f"{below} or {above}" if below else f"{above}"
        raise LayoutError(
            f"a global batch of {batch_size} samples cannot be divided by layout {self}: "
            f"{self.data_parallel} workers × {self.micro} micro-batches = {parts} equal parts",
            cause="every worker computes the same number of samples of each micro-batch",
            next_step=f"use a batch_size of {nearest}, or another layout",
        )


_NAMED = {"schedule": SCHEDULE_NAMES, "recompute": RECOMPUTE, "sequence": SEQUENCE}


def _read_name(text: str, key: str, value: str) -> str:
    if value in _NAMED[key]:
        return value
    near = difflib.get_close_matches(value, _NAMED[key], n=1)
    raise LayoutError(
        f"layout {text!r}: {key} is {value!r}",
        cause=f"perhaps {near[0]!r} was meant" if near else "",
        next_step=f"use one of {', '.join(_NAMED[key])}",
    )


def _read_size(text: str, key: str, value: str) -> int:
    if value.isdecimal() and int(value) >= 1:
        return int(value)
    raise LayoutError(
        f"layout {text!r}: {key} is {value!r}",
        next_step=f"give a whole number of at least 1, as in {key}=2",
    )


class Trial(Record):
    """One candidate layout, timed on the job itself."""

    layout: Layout
    label: str
    workers: int = Field(ge=1)
    threads: int = Field(ge=1)
    step_s: tuple[float, ...] = ()
    """Seconds per step, one entry per interleaved round."""
    group: int = 0
    """Its rounds were interleaved with those of the trials that have the same number."""
    median_step_s: float | None = None
    """Of all its steps, on rank 0; of rounds of three and more without the first, whose caches are cold."""
    compute_s: float | None = None
    communication_s: float | None = None
    data_s: float | None = None
    optimizer_s: float | None = None
    grown_bytes: int | None = None
    """By how much the memory of its worst worker grew with its first steps; None: not known."""
    evaluation_grown_bytes: int | None = None
    """The same until, after its first steps, it had evaluated a few batches; the steps themselves do not count."""
    error: str | None = None


class Plan(Record):
    """The chosen layout, why, and what was measured on the way."""

    layout: Layout
    label: str
    reason: str
    chosen_by: str
    """`trial` or `user`."""
    forecast_step_s: float | None = None
    """What the trial measured."""
    planned_step_s: float | None = None
    """What the planner forecast, before any step of this layout was timed."""
    planned_error_s: float | None = None
    trials: tuple[Trial, ...] = ()

    def to_event(self) -> dict[str, Any]:
        """As `to_json`, without the trials, which are events of their own."""
        return self.model_dump(mode="json", exclude={"trials"})


PROOF_TOLERANCE = 1e-5
"""Relative error up to which two quantities in float32 are the same."""


PROOF_LOSS_TOLERANCE = 1e-4
"""The same for the loss, where float64 has shown that differences in float32 are rounding."""


class Difference(Record):
    """How far one quantity of a layout's step is from the same quantity of one process."""

    kind: str
    """`loss`, `gradient norm` (before clipping), `gradient`, `parameter` (after its update) or `buffer`."""
    name: str
    """The parameter's or buffer's name; empty for the loss and the norm."""
    step: int = Field(ge=1)
    relative_error: float | None = None
    """None where no number can say it: then the note does."""
    note: str = ""

    @property
    def within_tolerance(self) -> bool:
        return self.relative_error is not None and self.relative_error <= PROOF_TOLERANCE

    def describe(self) -> str:
        """`gradient of inner.weight in step 1: relative error 0.5`."""
        what = f"{self.kind} of {self.name}" if self.name else self.kind
        how = f"relative error {self.relative_error:.2g}" if self.relative_error is not None else self.note
        return f"{what} in step {self.step}: {how}"


class Proof(Record):
    """Whether a layout trains what one process trains, and how far they are apart."""

    layout: Layout
    steps: int = Field(ge=0)
    samples: int = Field(ge=0)
    compared: int = Field(ge=0)
    """Quantities that were compared."""
    worst: tuple[Difference, ...] = ()
    """The largest differences, and the largest of each kind, the worst first."""
    switched_off: tuple[str, ...] = ()
    """Functions that would have drawn at random."""
    drawn_at_random: bool = False
    """The model draws random numbers that cannot be switched off: nothing was compared."""
    parted: str = ""
    """How the workers' parameters differ from each other afterwards."""
    in_float64: tuple[Difference, ...] = ()
    """The largest differences of the same steps in float64, which are taken where float32 leaves a doubt."""
    why_not_float64: str = ""
    """Why those steps could not be taken in float64."""
    left_whole: dict[str, str] = {}
    """Pieces of the model that tensor parallelism does not divide, as they failed a proof of their own, and why."""
    proof_s: float = Field(ge=0)

    @property
    def what_differs(self) -> str:
        """The worst difference beyond rounding, and how the workers have parted."""
        found = [difference.describe() for difference in self.worst[:1] if not difference.within_tolerance]
        return "; ".join(found + ([self.parted] if self.parted else []))

    @property
    def status(self) -> str:
        """`equal`, `different` or `not comparable`.

        A difference in float32 is rounding if it is gone in float64, and the loss agreed even in float32.
        """
        if self.drawn_at_random:
            return "not comparable"
        if self.parted:
            return "different"
        if all(d.within_tolerance for d in self.worst):
            return "equal"
        losses = [d.relative_error for d in self.worst if d.kind == "loss"]
        agreed = all(e is not None and e <= PROOF_LOSS_TOLERANCE for e in losses)
        is_rounding = bool(self.in_float64) and all(d.within_tolerance for d in self.in_float64)
        return "equal" if agreed and is_rounding else "different"


def describe_layout(layout: Layout, threads: int, device: str = "cpu") -> str:
    """`2 workers × 1 thread (tp=2)`; only the numbers where the batch alone is split."""
    text = describe(layout.workers, threads, device)
    return f"{text} ({layout.model_copy(update={'threads': None})})" if layout.splits_model else text


def describe(workers: int, threads: int, device: str = "cpu") -> str:
    """`2 workers × 1 thread`: a layout in words."""
    noun = "worker" if workers == 1 else "workers"
    if device != "cpu":
        return f"{workers} {noun} on {device}"
    return f"{workers} {noun} × {threads} thread{'s' if threads != 1 else ''}"
