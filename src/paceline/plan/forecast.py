"""What a layout would cost: seconds of a step, term by term, and bytes at a worker's worst moment.

docs/planning.md computes an example by hand.
"""

from __future__ import annotations

import bisect
import dataclasses
import functools
import itertools
from collections.abc import Sequence
from typing import Any

from paceline.errors import LayoutError
from paceline.plan import links
from paceline.plan.links import Placement
from paceline.plan.profile import Block, Costs, Division, Profile, Target
from paceline.plan.schedules import Schedule, make_schedule
from paceline.plan.timeline import Timeline, peak_of, simulate
from paceline.records import AXES, Layout, Record

SHARED_MEMORY = "shared memory"
"""Name of the link within a host over which workers can have one copy of the parameters."""


class Terms(Record):
    """Seconds of a step, of the worker that has most to do; they add up to the step."""

    compute_s: float = 0.0
    """Forward and backward passes, what is computed again included."""
    tensor_s: float = 0.0
    """What tensor parallelism exchanges within them."""
    bubble_s: float = 0.0
    """Waiting for other stages of the pipeline."""
    messages_s: float = 0.0
    """What sending between stages adds to that."""
    gather_s: float = 0.0
    """All-gathers of sharded parameters."""
    gradients_s: float = 0.0
    """Adding up gradients over the workers that have the same parameters."""
    optimizer_s: float = 0.0
    data_s: float = 0.0
    fixed_s: float = 0.0
    """Of every step, and meetings of workers."""

    @property
    def step_s(self) -> float:
        return sum(getattr(self, name) for name in type(self).model_fields)


class Memory(Record):
    """Bytes of one worker at its worst moment; they add up."""

    base: int = 0
    parameters: int = 0
    gradients: int = 0
    state: int = 0
    """Of the optimizer."""
    saved: int = 0
    """What forward passes keep for backward passes."""
    temporary: int = 0
    """Within a block, and what is gathered or exchanged."""

    @property
    def total(self) -> int:
        return sum(getattr(self, name) for name in type(self).model_fields)


class Forecast(Record):
    """Of one layout."""

    layout: Layout
    terms: Terms
    memory: Memory
    """Of the worker that needs most."""
    samples: int
    """Of a step."""

    @property
    def step_s(self) -> float:
        return self.terms.step_s

    @property
    def samples_per_s(self) -> float:
        return self.samples / self.step_s


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one worker computes of one pipeline stage for one micro-batch; seconds and bytes."""

    forward_s: float
    input_s: float
    weight_s: float
    tensor_s: float
    """Of these three together: what tensor parallelism exchanges."""
    parameter_bytes: int
    trained_bytes: int
    saved_bytes: float
    peak_bytes: float
    output_bytes: float
    """What crosses the cut after it."""
    num_blocks: int
    largest_bytes: int
    """Parameters of the largest block."""

    @property
    def busy_s(self) -> float:
        return self.forward_s + self.input_s + self.weight_s


class Forecaster:
    """Forecasts layouts of one job on one target. What several layouts have in common is computed once."""

    def __init__(self, profile: Profile, target: Target) -> None:
        self.profile, self.target = profile, target
        self._stages: dict[Any, tuple[Stage, ...]] = {}
        self._timelines: dict[Any, tuple[Timeline, float]] = {}

    def forecast(self, layout: Layout) -> Forecast:
        """The forecast of a layout.

        Raises:
            LayoutError: the batch, the model or the target does not allow it.
        """
        self.check(layout)
        costs, stages = self.costs_of(layout), self.stages_of(layout)
        schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
        held = [[stages[s] for s in schedule.stages_of(worker)] for worker in range(layout.pp)]
        terms = self._computing(layout, stages, schedule)
        rest = [self._updating(layout, costs, mine) for mine in held]
        # Whoever takes longest for its gradients and its update keeps the others waiting.
        slowest = max(rest, key=lambda t: t.gather_s + t.gradients_s + t.optimizer_s + t.fixed_s)
        samples = self.profile.batch_size / layout.data_parallel
        terms = slowest.model_copy(
            update={
                **{
                    name: getattr(terms, name) for name in ("compute_s", "tensor_s", "bubble_s", "messages_s")
                },
                "data_s": costs.data_s(samples),
            }
        )
        memory = max((self._memory(layout, mine, w) for w, mine in enumerate(held)), key=lambda m: m.total)
        return Forecast(layout=layout, terms=terms, memory=memory, samples=self.profile.batch_size)

    def least_s(self, layout: Layout) -> float:
        """What a step of a layout takes at least: no more than its forecast, and found without playing its schedule.

        A worker of a pipeline cannot begin before a micro-batch has come to its first stage, nor end before the last
        gradients have gone back from there.
        """
        stages = self.stages_of(layout)
        schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
        least_s = 0.0
        for worker in range(layout.pp):
            mine = schedule.stages_of(worker)
            before = stages[: mine[0]]
            on_the_way_s = sum(stage.forward_s + stage.input_s for stage in before)
            busy_s = layout.micro * sum(stages[s].busy_s for s in mine)
            least_s = max(least_s, on_the_way_s + busy_s)
        return least_s

    def check(self, layout: Layout) -> None:
        """Raise `LayoutError` unless there is what the layout needs."""
        layout.check_batch(self.profile.batch_size)
        if layout.workers > self.target.cluster.workers:
            raise LayoutError(
                f"layout {layout} needs {layout.workers} workers, and there are {self.target.cluster.workers}",
                next_step="give it fewer, or more hosts",
            )
        costs = self.costs_of(layout)
        if any(block.divided(layout.tp) is None for block in costs.blocks):
            raise LayoutError(
                f"layout {layout}: what tp={layout.tp} makes of the model was not measured",
                next_step="measure it, or use another tp",
            )
        schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
        if schedule.num_stages > len(costs.model):
            raise LayoutError(
                f"layout {layout} has {schedule.num_stages} stages, and the model {len(costs.model)} blocks",
                next_step="use a smaller pp, or fewer stages",
            )

    def costs_of(self, layout: Layout) -> Costs:
        """What was measured with as many threads, and workers at a time, as the layout has."""
        return self.profile.of(layout.threads, min(layout.workers, self.target.per_host))

    def micro_samples(self, layout: Layout) -> float:
        """Samples of one worker in one micro-batch."""
        return self.profile.batch_size / (layout.data_parallel * layout.micro)

    def place(self, layout: Layout, axis: str) -> Placement:
        """Where the workers are that differ along one axis only; `data`: along both of data parallelism."""
        axes = ("dp_replicate", "dp_shard") if axis == "data" else (axis,)
        size = 1
        for name in axes:
            size *= getattr(layout, name)
        inner = AXES[AXES.index(axes[-1]) + 1 :]
        stride = 1
        for name in inner:
            stride *= getattr(layout, name)
        per_host = self.target.per_host
        if layout.workers <= self.target.cluster.hosts[0].workers:
            return Placement(hosts=1, per_host=size)
        together = max(1, min(size, per_host // stride)) if stride <= per_host else 1
        while size % together:
            together -= 1
        return Placement(
            hosts=size // together,
            per_host=together,
            beside=max(1, min(per_host, layout.workers) // together),
        )

    def stages_of(self, layout: Layout) -> tuple[Stage, ...]:
        """All stages in the model's order, cut where the slowest is fastest."""
        micro = self.micro_samples(layout)
        per_worker = make_schedule(layout.schedule, layout.pp, 1, layout.stages).stages_per_worker
        number = layout.pp * per_worker
        key = (
            layout.threads,
            min(layout.workers, self.target.per_host),
            layout.tp,
            micro,
            number,
            layout.recompute,
        )
        key += (self.target.slowest(layout.workers), self.place(layout, "tp"))
        if key not in self._stages:
            costs = self.costs_of(layout)
            computed = {id(b): self._compute(layout, b, micro) for b in costs.blocks}
            row = [computed[id(b)] for b in costs.model]
            # By computation alone: a faster link does not move the cuts, and so never makes a forecast slower.
            cuts = partition([piece.busy_s - piece.tensor_s for piece in row], number)
            self._stages[key] = tuple(_join(row[a:b]) for a, b in itertools.pairwise(cuts))
        return self._stages[key]

    def _compute(self, layout: Layout, block: Block, micro: float) -> Stage:
        """One block as a stage of its own."""
        part = block.divided(layout.tp)
        assert part is not None
        speed = self.target.slowest(layout.workers)
        forward_s, backward_s = part.forward_s(micro) / speed, part.backward_s(micro) / speed
        again = {"none": 0.0, "selective": block.selective_share, "full": 1.0}[layout.recompute]
        forward_x, backward_x = 0.0, 0.0
        if isinstance(part, Division):
            place = self.place(layout, "tp")
            forward_x = self._exchange_s(part.forward_exchanges, place, micro)
            backward_x = self._exchange_s(part.backward_exchanges, place, micro)
        # What is exchanged in a forward pass is exchanged again where all of it is computed again.
        again_x = forward_x if layout.recompute == "full" else 0.0
        weight_s = backward_s * block.weights_share
        saved = {
            "none": part.saved_bytes,
            "selective": part.saved_selective_bytes,
            "full": part.saved_full_bytes,
        }[layout.recompute]
        # One block is whole again while its backward pass runs.
        peak = part.peak_bytes + (part.saved_bytes - saved)
        return Stage(
            forward_s=forward_s + forward_x,
            input_s=backward_s - weight_s + forward_s * again + backward_x + again_x,
            weight_s=weight_s,
            tensor_s=forward_x + backward_x + again_x,
            parameter_bytes=part.parameter_bytes,
            trained_bytes=part.trained_bytes,
            saved_bytes=saved * micro,
            peak_bytes=peak * micro,
            output_bytes=block.output_bytes * micro,
            num_blocks=1,
            largest_bytes=part.parameter_bytes,
        )

    def _exchange_s(self, exchanges: Sequence[tuple[str, float]], place: Placement, micro: float) -> float:
        return sum(self._link_s(kind, place, num_bytes * micro) for kind, num_bytes in exchanges)

    def _link_s(self, kind: str, place: Placement, num_bytes: float) -> float:
        return links.seconds(self.target.within, self.target.between, kind, place, num_bytes)

    def _computing(self, layout: Layout, stages: Sequence[Stage], schedule: Schedule) -> Terms:
        busy = [
            (
                layout.micro * sum(stages[s].busy_s for s in mine),
                layout.micro * sum(stages[s].tensor_s for s in mine),
            )
            for mine in map(schedule.stages_of, range(layout.pp))
        ]
        busy_s, tensor_s = max(busy)
        if layout.pp == 1:
            return Terms(compute_s=busy_s - tensor_s, tensor_s=tensor_s)
        timeline, without_s = self.timeline(layout)
        return Terms(
            compute_s=busy_s - tensor_s,
            tensor_s=tensor_s,
            bubble_s=without_s - busy_s,
            messages_s=timeline.makespan_s - without_s,
        )

    def timeline(self, layout: Layout) -> tuple[Timeline, float]:
        """A pipeline's step; and how long it would take if sending took no time."""
        stages = self.stages_of(layout)
        place = self.place(layout, "pp")
        # A value goes to the next stage: over the cable wherever neighbours are on different hosts.
        hop = (
            Placement(hosts=2, per_host=1, beside=place.beside)
            if place.hosts > 1
            else Placement(hosts=1, per_host=2)
        )
        send_s = self._link_s("message", hop, max(s.output_bytes for s in stages[:-1]))
        key = (layout.schedule, layout.pp, layout.micro, stages, send_s)
        if key not in self._timelines:
            schedule = make_schedule(layout.schedule, layout.pp, layout.micro, layout.stages)
            each = [[getattr(s, name) for s in stages] for name in ("forward_s", "input_s", "weight_s")]
            found = simulate(schedule, *each, send_s=send_s)
            without_s = simulate(schedule, *each).makespan_s if send_s else found.makespan_s
            self._timelines[key] = found, without_s
        return self._timelines[key]

    def one_copy(self, layout: Layout) -> bool:
        """Whether the workers of a host have one copy of the parameters between them, of which each updates a share."""
        return (
            layout.dp_shard == 1
            and self.profile.shares_update
            and self.target.within.name == SHARED_MEMORY
            and self.place(layout, "data").per_host > 1
        )

    def _updating(self, layout: Layout, costs: Costs, mine: Sequence[Stage]) -> Terms:
        """From a worker's gradients to its updated parameters."""
        trained = sum(stage.trained_bytes for stage in mine)
        whole = sum(stage.parameter_bytes for stage in mine)
        speed = self.target.slowest(layout.workers)
        update_s, add_s = costs.optimizer_s_per_byte / speed, costs.add_s_per_byte / speed
        n = layout.data_parallel
        if n == 1:
            return Terms(optimizer_s=trained * update_s, fixed_s=costs.fixed_s)
        place = self.place(layout, "data")
        if self.one_copy(layout):
            k = place.per_host
            across = Placement(hosts=place.hosts, per_host=1, beside=place.beside * k)
            added_s = trained * add_s + (k - 1) * trained / k * add_s
            return Terms(
                gradients_s=added_s + self._link_s("all-reduce", across, trained / k),
                optimizer_s=trained / k * update_s,
                fixed_s=costs.fixed_s + 2 * costs.meeting_s,
            )
        if layout.dp_shard == 1:
            return Terms(
                gradients_s=2 * trained * add_s + self._link_s("all-reduce", place, trained),
                optimizer_s=trained * update_s,
                fixed_s=costs.fixed_s,
            )
        shard, replicate = self.place(layout, "dp_shard"), self.place(layout, "dp_replicate")
        units = sum(stage.num_blocks for stage in mine)
        times = {1: 1, 2: 1, 3: 2 * layout.micro}[layout.zero_stage]
        gather_s = times * units * self._link_s("all-gather", shard, whole / units)
        reduce_s = layout.micro * units * self._link_s("reduce-scatter", shard, trained / units)
        return Terms(
            gather_s=gather_s,
            gradients_s=2 * trained * add_s * layout.micro
            + reduce_s
            + self._link_s("all-reduce", replicate, trained / layout.dp_shard),
            optimizer_s=trained / layout.dp_shard * update_s,
            fixed_s=costs.fixed_s,
        )

    def _memory(self, layout: Layout, mine: Sequence[Stage], worker: int) -> Memory:
        trained = sum(stage.trained_bytes for stage in mine)
        whole = sum(stage.parameter_bytes for stage in mine)
        largest = max(stage.largest_bytes for stage in mine)
        if layout.pp == 1:
            saved = sum(stage.saved_bytes for stage in mine)
        else:
            # What is stored are pairs of a stage and a micro-batch: no more than so many of the largest.
            stored = peak_stored(layout.schedule, layout.pp, layout.micro, layout.stages)[worker]
            saved = stored * max(stage.saved_bytes for stage in mine)
        parameters, gradients, held = float(whole), float(trained), float(trained)
        temporary = max(stage.peak_bytes for stage in mine)
        s = layout.dp_shard
        if s > 1:
            held /= s
            gradients = trained / s + min(trained, largest)
            if layout.zero_stage > 1:
                parameters = whole / s
                temporary += largest if layout.zero_stage == 3 else whole
        elif self.one_copy(layout):
            k = self.place(layout, "data").per_host
            parameters, held = whole / k, trained / k
        return Memory(
            base=self.profile.base_bytes,
            parameters=round(parameters),
            gradients=round(gradients),
            state=round(held * self.profile.state_per_byte),
            saved=round(saved),
            temporary=round(temporary),
        )


@functools.cache
def peak_stored(schedule: str, pp: int, micro: int, stages: int | None) -> tuple[int, ...]:
    """`Timeline.peak_stored` of a schedule, which does not depend on what its actions take."""
    made = make_schedule(schedule, pp, micro, stages)
    return tuple(peak_of(made.actions(worker)) for worker in range(pp))


def _join(pieces: Sequence[Stage]) -> Stage:
    """Blocks one after the other."""
    total = functools.partial(_total, pieces)
    return Stage(
        forward_s=total("forward_s"),
        input_s=total("input_s"),
        weight_s=total("weight_s"),
        tensor_s=total("tensor_s"),
        parameter_bytes=int(total("parameter_bytes")),
        trained_bytes=int(total("trained_bytes")),
        saved_bytes=total("saved_bytes"),
        peak_bytes=max(piece.peak_bytes for piece in pieces),
        output_bytes=pieces[-1].output_bytes,
        num_blocks=len(pieces),
        largest_bytes=max(piece.largest_bytes for piece in pieces),
    )


def _total(pieces: Sequence[Stage], name: str) -> float:
    return sum(getattr(piece, name) for piece in pieces)


def partition(costs: Sequence[float], number: int) -> list[int]:
    """Where to cut a row into `number` parts, none empty, so that the largest sum is smallest: `number + 1` bounds.

    By bisection on the largest sum; each part takes as much as it may, so long as enough is left for the others.

    Raises:
        ValueError: there is less in the row.
    """
    if number > len(costs):
        raise ValueError(f"{len(costs)} costs cannot be cut into {number} parts")
    sums = [0.0, *itertools.accumulate(costs)]

    def cut(most: float) -> list[int] | None:
        bounds = [0]
        for left in range(number - 1, -1, -1):
            begin = bounds[-1]
            end = bisect.bisect_right(sums, sums[begin] + most * (1 + 1e-12)) - 1
            end = min(end, len(costs) - left)
            if end <= begin:
                return None
            bounds.append(end)
        return bounds if bounds[-1] == len(costs) else None

    low, high = max(max(costs), sums[-1] / number), sums[-1]
    best = cut(high)
    assert best is not None
    for _ in range(60):
        middle = (low + high) / 2
        found = cut(middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
        if high - low <= 1e-9 * high:
            break
    return best
