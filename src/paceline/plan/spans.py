"""A forecast step as it passes in time: what each worker does from when to when.

It is drawn as the forecast counts it (`paceline.plan.forecast`), and so ends when the forecast says: the samples are
read, the pipeline's schedule is played action by action, and when the last worker has ended it, gradients are added up
and parameters updated. Workers that differ in data and tensor parallelism alone do the same at the same time, and are
one row, the first of pipelines that wait for each other's messages; on unequal hosts all of them are as fast as the
slowest of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence

from paceline.plan.forecast import Forecaster, Parts
from paceline.plan.schedules import make_schedule
from paceline.plan.sharing import simulate_sharing
from paceline.plan.stages import Stage
from paceline.plan.timeline import Timeline
from paceline.records import Layout, Record

TERM_OF = {
    "data": "data_s",
    "forward": "compute_s",
    "recompute": "compute_s",
    "backward": "compute_s",
    "weights": "compute_s",
    "overhead": "overhead_s",
    "tensor": "tensor_s",
    "message": "messages_s",
    "bubble": "bubble_s",
    "gather": "gather_s",
    "gradients": "gradients_s",
    "optimizer": "optimizer_s",
    "fixed": "fixed_s",
    "unexplained": "unexplained_s",
    "wait": None,
}
"""Kinds of spans, and the term of the forecast that each is part of. `weights` are gradients of weights where they are
an action of their own; `overhead` is what running an action takes beside its blocks; `tensor` is what tensor
parallelism exchanges; `wait` is for the worker whose update takes longest."""

_Pieces = Sequence[tuple[str, float]]
"""Kinds and seconds, one after the other."""
_NOTHING = 1e-12
"""Share of a step below which a span is rounding."""


class StepSpan(Record):
    """One thing that a worker does, or waits for."""

    kind: str
    """One of `TERM_OF`."""
    begin_s: float
    end_s: float
    stage: int | None = None
    """Of the pipeline, along the model; with `micro` where the span is part of an action."""
    micro: int | None = None

    @property
    def seconds(self) -> float:
        return self.end_s - self.begin_s


class WorkerSpans(Record):
    """A step of workers that do the same at the same time."""

    ranks: tuple[int, ...]
    spans: tuple[StepSpan, ...]
    """In order, each begins where the one before it ends; from 0 to the end of the step."""

    def seconds(self) -> dict[str, float]:
        """Of each kind that there is."""
        found: dict[str, float] = {}
        for span in self.spans:
            found[span.kind] = found.get(span.kind, 0.0) + span.seconds
        return found


class StepTimeline(Record):
    """A forecast step of a layout."""

    layout: Layout
    step_s: float
    workers: tuple[WorkerSpans, ...]
    """One for each worker of a pipeline, in the order of its first stage."""
    busiest: int
    """Of `workers`: who computes longest, and of whom the forecast's terms up to the gradients are."""


def step_timeline(forecaster: Forecaster, layout: Layout) -> StepTimeline:
    """The step that `forecaster` forecasts.

    Raises:
        LayoutError: the batch, the model or the cluster does not allow the layout.
    """
    forecast = forecaster.forecast(layout)
    parts, step_s, data_s = forecaster.parts(layout), forecast.step_s, forecast.terms.data_s
    unexplained_s = forecast.terms.unexplained_s
    data = _cut(0.0, data_s, [("data", data_s)])
    if layout.pp == 1:
        rows = [data + _one_stage(layout, parts, data_s)]
    else:
        rows = [data + row for row in _pipeline(layout, parts, data_s)]
    inner = layout.workers // layout.pp
    workers = tuple(
        WorkerSpans(
            ranks=tuple(range(at * inner, (at + 1) * inner)),
            spans=_until(_with_unexplained(row, step_s, unexplained_s), step_s),
        )
        for at, row in enumerate(rows)
    )
    busy_s = [
        sum(
            s
            for kind, s in worker.seconds().items()
            if TERM_OF[kind] in ("compute_s", "tensor_s", "overhead_s")
        )
        for worker in workers
    ]
    return StepTimeline(
        layout=layout,
        step_s=step_s,
        workers=workers,
        busiest=max(range(len(workers)), key=busy_s.__getitem__),
    )


def _one_stage(layout: Layout, parts: Parts, begin_s: float) -> list[StepSpan]:
    """Workers with all of the model's blocks: one micro-batch after the other."""
    (stage,), (updating,) = parts.stages, parts.updating
    gather_s, gradients_s = updating.get("gather_s", 0.0), updating.get("gradients_s", 0.0)
    zero = layout.zero_stage if layout.dp_shard > 1 else 0
    # Sharded, gradients go to the workers that keep them in each micro-batch, or in the end; then shards meet their
    # copies.
    last_s = parts.copies_s if zero and not layout.keeps_gradients else gradients_s
    each_s = (gradients_s - last_s) / layout.micro
    gathered_s = gather_s / (2 * layout.micro) if zero == 3 else 0.0
    row: list[StepSpan] = []

    def add(pieces: _Pieces, micro: int | None = None) -> None:
        now_s = row[-1].end_s if row else begin_s
        row.extend(
            _cut(now_s, now_s + sum(s for _, s in pieces), pieces, None if micro is None else 0, micro)
        )

    add([("gather", gather_s)] if zero == 2 else [])
    for micro in range(layout.micro):
        add(
            [("gather", gathered_s), *_pieces(stage, "F"), ("gather", gathered_s), *_pieces(stage, "B")],
            micro,
        )
        add([("gradients", each_s)], micro)
    add([("gradients", last_s), ("optimizer", updating["optimizer_s"])])
    add([("gather", gather_s)] if zero == 1 else [])
    add([("fixed", updating["fixed_s"])])
    return row


def _pipeline(layout: Layout, parts: Parts, data_s: float) -> list[list[StepSpan]]:
    """Each worker's actions as its schedule orders them; then, when all have ended, its update."""
    schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
    forward_s, input_s, weight_s = zip(
        *((s.forward_s, s.input_s, s.weight_s) for s in parts.stages), strict=True
    )
    played, at_once = (
        simulate_sharing(schedule, forward_s, input_s, weight_s, hops, parts.sharing)
        for hops in (parts.sending.hops, ())
    )
    slowest_s = max(sum(terms.values()) for terms in parts.updating)
    rows = []
    for worker, updating in enumerate(parts.updating):
        row: list[StepSpan] = []
        now_s = 0.0
        delays_s = _delays(played, at_once, worker, parts.sending.behind_s)
        for span, (before_s, delay_s) in zip(
            played.spans[worker], itertools.pairwise(delays_s), strict=False
        ):
            row += _waiting(data_s + now_s, data_s + span.begin_s, delay_s - before_s)
            action = span.action
            pieces = _pieces(parts.stages[action.stage], action.kind)
            if parts.sharing is not None:
                pieces = _filling(pieces, span.end_s - span.begin_s)
            row += _cut(data_s + span.begin_s, data_s + span.end_s, pieces, action.stage, action.micro)
            now_s = span.end_s
        end_s = data_s + played.makespan_s + parts.sending.behind_s
        row += _waiting(data_s + now_s, end_s, delays_s[-1] - delays_s[-2])
        names = ("gradients", "optimizer", "gather", "fixed")
        update = [(name, updating.get(f"{name}_s", 0.0)) for name in names]
        update.append(("wait", slowest_s - sum(updating.values())))
        rows.append(row + _cut(end_s, end_s + slowest_s, update))
    return rows


def _delays(played: Timeline, at_once: Timeline, worker: int, behind_s: float) -> list[float]:
    """By how much sending has delayed a worker for good: 0 at first, before each of its actions, and at the end.

    An action may begin later than it would if sending took no time, and later ones make up for it in what would have
    been a bubble. What is not made up for adds up to what sending adds to the step.
    """
    pairs = zip(played.spans[worker], at_once.spans[worker], strict=True)
    delays_s = [max(0.0, span.begin_s - other.begin_s) for span, other in pairs]
    delays_s.append(max(0.0, played.makespan_s + behind_s - at_once.makespan_s))
    lasting_s = list(itertools.accumulate(reversed(delays_s), min))
    return [0.0, *reversed(lasting_s)]


def _waiting(begin_s: float, end_s: float, sending_s: float) -> list[StepSpan]:
    """A wait in a pipeline: what it would be without messages, and then what these add."""
    return _cut(begin_s, end_s, [("bubble", end_s - begin_s - sending_s), ("message", sending_s)])


def _with_unexplained(row: list[StepSpan], step_s: float, unexplained_s: float) -> list[StepSpan]:
    """A step with what is unexplained at its end; where the terms are too much, all of it is as much shorter."""
    known_s = step_s - unexplained_s
    if unexplained_s >= 0:
        return row + _cut(known_s, step_s, [("unexplained", unexplained_s)])
    scale = step_s / known_s
    return [
        span.model_copy(update={"begin_s": span.begin_s * scale, "end_s": span.end_s * scale}) for span in row
    ]


def _pieces(stage: Stage, kind: str) -> _Pieces:
    """What an action is made of. Its exchanges come last, though each follows its own block."""
    backward_tensor_s = stage.tensor_s - stage.forward_tensor_s
    overhead_s = (stage.overhead_s - stage.weight_overhead_s) / 2
    overhead = ("overhead", overhead_s)
    input_s = stage.input_s - stage.again_s - backward_tensor_s - overhead_s
    match kind:
        case "F":
            forward_s = stage.forward_s - stage.forward_tensor_s - overhead_s
            return [overhead, ("forward", forward_s), ("tensor", stage.forward_tensor_s)]
        case "W":
            overhead_s = stage.weight_overhead_s
            return [("overhead", overhead_s), ("weights", stage.weight_s - overhead_s)]
        case "I":
            return [
                overhead,
                ("recompute", stage.again_s),
                ("backward", input_s),
                ("tensor", backward_tensor_s),
            ]
        case _:
            return [
                overhead,
                ("recompute", stage.again_s),
                ("backward", input_s + stage.weight_s),
                ("tensor", backward_tensor_s),
            ]


def _filling(pieces: _Pieces, seconds: float) -> _Pieces:
    """As they are to each other, so many seconds of them."""
    whole_s = sum(s for _, s in pieces)
    return [(kind, s * seconds / whole_s) for kind, s in pieces] if whole_s else pieces


def _cut(
    begin_s: float, end_s: float, pieces: _Pieces, stage: int | None = None, micro: int | None = None
) -> list[StepSpan]:
    """From `begin_s` to `end_s`, which the pieces fill but for rounding."""
    least_s = _NOTHING * max(abs(end_s), end_s - begin_s)
    held = [(kind, seconds) for kind, seconds in pieces if seconds > least_s]
    found = []
    for at, (kind, seconds) in enumerate(held):
        then_s = end_s if at == len(held) - 1 else min(begin_s + seconds, end_s)
        if then_s <= begin_s:
            continue
        found.append(StepSpan(kind=kind, begin_s=begin_s, end_s=then_s, stage=stage, micro=micro))
        begin_s = then_s
    return found


def _until(row: Iterable[StepSpan], end_s: float) -> tuple[StepSpan, ...]:
    """Each span from the end of the one before it, the last to `end_s`: what rounding has left between them is gone."""
    found: list[StepSpan] = []
    begin_s = 0.0
    for span in row:
        found.append(span.model_copy(update={"begin_s": begin_s}))
        begin_s = span.end_s
    if found:
        found[-1] = found[-1].model_copy(update={"end_s": end_s})
    return tuple(found)
