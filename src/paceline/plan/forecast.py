"""What a layout would cost: seconds of a step, term by term, and bytes at a worker's worst moment.

docs/planning.md computes an example by hand.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

from paceline.errors import LayoutError
from paceline.plan.cutting import Cuts, Cutting
from paceline.plan.links import Placement
from paceline.plan.memory import evaluation_memory, training_memory
from paceline.plan.orders import peak_stored, stages_of_workers, workers_of_stages
from paceline.plan.pipelines import Pipelines
from paceline.plan.places import Places
from paceline.plan.profile import (
    Block,
    Costs,
    Division,
    LinkedCluster,
    Profile,
    between,
)
from paceline.plan.schedules import SCHEDULES
from paceline.plan.sending import Sending
from paceline.plan.sharing import Sharing
from paceline.plan.stages import Stage, join
from paceline.plan.terms import Forecast, Memory, Terms
from paceline.plan.unexplained import Unexplained
from paceline.plan.updates import one_copy, updating
from paceline.records import Layout

_UNTRIED = 1.4
"""By how much more forecasts of layouts err that were not tried (docs/forecasts.md)."""


@dataclasses.dataclass(frozen=True)
class Parts:
    """What a forecast is added up from, of each worker of a pipeline."""

    stages: tuple[Stage, ...]
    """In the model's order."""
    sending: Sending
    """What crosses the cuts between them."""
    updating: tuple[dict[str, float], ...]
    """Of each worker: the terms between its gradients and its updated parameters."""
    copies_s: float
    """Without a pipeline: adding up the gradients of a shard among who has the same, after the last micro-batch."""
    sharing: Sharing | None = None
    """How workers of a pipeline share cores."""


class Forecaster:
    """Forecasts layouts of one job on one cluster. What several layouts have in common is computed once."""

    def __init__(
        self,
        profile: Profile,
        linked: LinkedCluster,
        *,
        memory_bytes: int | None = None,
        cut_as: Forecaster | None = None,
    ) -> None:
        """
        Args:
            memory_bytes: what a worker has, for where a pipeline is cut; None: its share of its host's memory.
            cut_as: pipelines are cut where this one cuts them.
        """
        self.profile, self.linked = profile, linked
        self._cutting: Cutting = Cutting(self, memory_bytes) if cut_as is None else cut_as._cutting
        self._stages: dict[Any, tuple[Stage, ...]] = {}
        self._held: dict[Any, list[tuple[Memory, Memory]]] = {}
        self._places = Places(linked)
        self._pipelines = Pipelines(profile, self._places)
        self._unexplained = Unexplained(profile, linked, self._places, self._cutting.of)
        self._costs: dict[Any, Costs] = {}
        self._rows_s: dict[Any, float] = {}
        """Of all blocks, one after the other, in one micro-batch."""

    def forecast(self, layout: Layout, *, apart: bool = True) -> Forecast:
        """The forecast of a layout.

        Args:
            apart: tell messages between stages and waiting for stages apart; else both may be in `bubble_s`.

        Raises:
            LayoutError: the batch, the model or the cluster does not allow it.
        """
        self.check(layout)
        costs, stages = self.costs_of(layout), self.stages_of(layout)
        computing = self._computing(layout, stages, apart=apart)
        # Whoever takes longest for its gradients and its update keeps the others waiting.
        slowest = max(self._updates(layout, stages), key=lambda terms: sum(terms.values()))
        data_s = costs.data_s(self.profile.batch_size / layout.data_parallel)
        terms = computing.model_copy(update={**slowest, "data_s": data_s})
        step_s = self._unexplained.step_s(layout, terms)
        if not apart and step_s < terms.step_s:
            return self.forecast(layout)  # how much may be taken off depends on what is sent
        neighbours = self._unexplained.neighbours(layout)
        if neighbours is not None:
            step_s = min(step_s, neighbours.chord_s(lambda one: self.forecast(one).step_s))
        if not self._unexplained.was_tried(layout):
            one_by_one_s = self._one_after_the_other_s(layout, terms.optimizer_s)
            step_s = max(step_s, one_by_one_s, self._unexplained.least_s(layout))
        terms = terms.model_copy(update={"unexplained_s": step_s - terms.step_s})
        return Forecast(
            layout=layout,
            terms=terms,
            memory=max(self.memories(layout), key=_total),
            samples=self.profile.batch_size,
            error_s=terms.step_s * self.relative_error(layout),
        )

    def on_the_lines_s(self, layout: Layout) -> float:
        """Seconds of a step by its terms and the corrections alone, which may take more off it than a forecast does."""
        terms = self.forecast(layout).terms
        return terms.step_s - terms.unexplained_s + self._unexplained.more_s(layout)

    def _one_after_the_other_s(self, layout: Layout, optimizer_s: float) -> float:
        """What a pipeline takes at least, as what a process does by itself is done one after the other there: all of
        it where there is one micro-batch, or one core, up to the update. No bound: 0."""
        if layout.pp == 1 or layout.data_parallel * layout.tp > 1:
            return 0.0
        sharing, at_once = self.sharing_of(layout), 1.0
        if layout.micro > 1 or SCHEDULES[layout.schedule].in_parts:
            if sharing is None:
                return 0.0
            at_once = sharing.at_once
        alone = self.forecast(Layout(threads=layout.threads, micro=layout.micro))
        return (alone.step_s - alone.terms.optimizer_s) / at_once + optimizer_s

    def relative_error(self, layout: Layout) -> float:
        """Of a forecast: the errors of past forecasts and of the measurements, which are independent of each other.

        Past forecasts are those of runs, in layouts that had been tried: others err by more.
        """
        times = 1.0 if self._unexplained.was_tried(layout) else _UNTRIED
        return math.hypot(self.profile.past_error * times, self.profile.spread)

    def least_s(self, layout: Layout) -> float:
        """What a step of a layout takes at least, and of what computes some of it again: no more than its forecast, and
        found without playing its schedule.

        A worker of a pipeline cannot begin before a micro-batch has come to its first stage, nor end before the last
        gradients have gone back from there; and who has most parameters has to update them.
        """
        costs, actions_s = self.costs_of(layout), self._actions_s(layout)

        def cut_s(cuts: Cuts) -> float:
            stages = self._stages_cut(layout, cuts, actions_s)
            updating = self._updating(layout, costs, *self._heaviest(layout, stages))
            return self._least_computing_s(layout, stages) + sum(updating.values())

        # However it has to be cut to fit.
        data_s = costs.data_s(self.profile.batch_size / layout.data_parallel)
        least_s = min(map(cut_s, self._cutting.all_of(layout))) + data_s
        return self._bound_s(layout, least_s, self.least_s)

    def floor_s(self, layout: Layout) -> float:
        """No more than `least_s`, and found without cutting the model, nor looking at what is exchanged.

        Somebody computes its share of all blocks in all micro-batches. Where nobody can begin before the stages before
        its own, nor end before they have, with the shares of that which take least: where `x` of a micro-batch is one
        worker's and `P` is before it, `P + micro · x` is no more than the whole, so that what is left of the whole
        falls by a `micro`-th at most with each worker.
        """
        speeds = self._places.speeds_along(layout)
        key = self.kind_of_row(layout), max(speeds)
        if key not in self._rows_s:
            self._rows_s[key] = sum(block.busy_s for block in self.row(layout, max(speeds)))
        share, schedule = layout.micro / layout.pp, SCHEDULES[layout.schedule]
        if layout.pp > 1 and not schedule.in_parts and schedule.default_stages == 1:
            share = 1 / (1 - (1 - 1 / layout.micro) ** layout.pp)
        sharing = self.sharing_of(layout)
        floor_s = self._rows_s[key] * share / (1.0 if sharing is None else sharing.rates[0])
        return self._bound_s(layout, floor_s, self.floor_s)

    def _bound_s(self, layout: Layout, step_s: float, bound_s: Callable[[Layout], float]) -> float:
        """What such a step takes at least with what is unexplained, however it is cut.

        Args:
            bound_s: of the pipelines between which it lies.
        """
        least_s = self._unexplained.corrected_s(layout, step_s, is_bound=True)
        between = self._unexplained.between(layout)
        return least_s if between is None else min(least_s, between.chord_s(bound_s))

    def _heaviest(self, layout: Layout, stages: Sequence[Stage]) -> tuple[list[Stage], float]:
        """The stages of the worker that has most parameters to update for its speed, and that."""
        mine_of = stages_of_workers(layout.schedule, layout.pp, layout.stages)
        speeds = self._places.speeds_along(layout)
        bytes_of = [sum(stages[s].trained_bytes for s in mine) for mine in mine_of]
        worker = max(range(layout.pp), key=lambda at: bytes_of[at] / speeds[at])
        return [stages[s] for s in mine_of[worker]], speeds[worker]

    def _least_computing_s(self, layout: Layout, stages: tuple[Stage, ...]) -> float:
        if layout.pp == 1:
            return layout.micro * stages[0].busy_s
        sends = self._pipelines.sending(layout, stages)
        in_parts = SCHEDULES[layout.schedule].in_parts
        each_s = [*(hop.there_s for hop in sends.hops), 0.0]
        backward_s = [s.input_s + (0.0 if in_parts else s.weight_s) for s in stages]
        there_s, back_s = (
            [0.0, *itertools.accumulate(s + hop_s for s, hop_s in zip(own_s, each_s, strict=True))]
            for own_s in ([s.forward_s for s in stages], backward_s)
        )
        least_s = 0.0
        for mine in stages_of_workers(layout.schedule, layout.pp, layout.stages):
            first = mine[0]
            weights_s = layout.micro * sum(stages[s].weight_s for s in mine)
            others_s = layout.micro * sum(stages[s].forward_s + stages[s].input_s for s in mine)
            # The gradients of weights may be computed while those of the inputs go back.
            hidden_s = min(back_s[first], weights_s) if in_parts else 0.0
            least_s = max(least_s, there_s[first] + others_s + weights_s + back_s[first] - hidden_s)
        sharing = self.sharing_of(layout)
        # All might compute as fast as one by itself.
        return (least_s if sharing is None else least_s / sharing.rates[0]) + sends.behind_s

    def check(self, layout: Layout) -> None:
        """Raise `LayoutError` unless there is what the layout needs."""
        layout.check_batch(self.profile.batch_size)
        if layout.workers > self.linked.cluster.workers:
            raise LayoutError(
                f"layout {layout} needs {layout.workers} workers, and there are {self.linked.cluster.workers}",
                next_step="give it fewer, or more hosts",
            )
        costs = self.costs_of(layout)
        if layout.micro == self.profile.batch_size > 1 and any(block.statistics for block in costs.blocks):
            raise LayoutError(
                f"layout {layout}: of a micro-batch of one sample batch norm has no statistics",
                next_step="use fewer micro-batches",
            )
        if any(block.divided(layout.tp) is None for block in costs.blocks):
            raise LayoutError(
                f"layout {layout}: what tp={layout.tp} makes of the model was not measured",
                next_step="measure it, or use another tp",
            )
        num_stages = sum(map(len, stages_of_workers(layout.schedule, layout.pp, layout.stages)))
        if num_stages > costs.most_stages:
            raise LayoutError(
                f"layout {layout} has {num_stages} stages, and the model {costs.most_stages} blocks",
                next_step="use a smaller pp, or fewer stages",
            )

    def costs_of(self, layout: Layout) -> Costs:
        """What was measured with as many threads, and workers at a time, as the layout has."""
        key = layout.threads, min(layout.workers, self.linked.per_host)
        if key not in self._costs:
            self._costs[key] = self.profile.of(*key)
        return self._costs[key]

    def micro_samples(self, layout: Layout) -> float:
        """Samples of one worker in one micro-batch."""
        return self.profile.batch_size / (layout.data_parallel * layout.micro)

    def place(self, layout: Layout, axis: str) -> Placement:
        """See `Places.of`."""
        return self._places.of(layout, axis)

    def stages_of(self, layout: Layout) -> tuple[Stage, ...]:
        """All stages in the model's order, cut as `cuts_of` says, each as fast as who computes it."""
        return self._stages_cut(layout, self._cutting.of(layout), self._actions_s(layout))

    def cuts_of(self, layout: Layout) -> Cuts:
        """Where the row of the model's pieces is cut; empty: the cluster does not allow the layout. See `Cutting`."""
        try:
            self.check(layout)
        except LayoutError:
            return ()
        return self._cutting.of(layout)

    def has_room(self, layout: Layout) -> bool:
        """Whether there is room for a layout that is cut as if memory had no end."""
        return self._cutting.of(layout) == self._cutting.freely(layout)

    def bare_s(self, layout: Layout, cuts: Cuts) -> float:
        """Of a pipeline that is cut so: its schedule, and the update, as measured by themselves."""
        stages = self._stages_cut(layout, cuts, (0.0, 0.0))
        sends = self._pipelines.sending(layout, stages)
        played_s, _ = self._pipelines.play(layout, stages, sends, self.sharing_of(layout))
        return played_s + max(sum(terms.values()) for terms in self._updates(layout, stages))

    def _actions_s(self, layout: Layout) -> tuple[float, float]:
        return self._unexplained.actions_s(layout) if layout.pp > 1 else (0.0, 0.0)

    def _stages_cut(self, layout: Layout, cuts: Cuts, actions_s: tuple[float, float]) -> tuple[Stage, ...]:
        """
        Args:
            actions_s: as `Unexplained.actions_s`.
        """
        speeds = self.speeds_of_stages(layout)
        key = self.kind_of_row(layout), speeds, cuts, actions_s
        if key not in self._stages:
            rows = {speed: self.row(layout, speed) for speed in dict.fromkeys(speeds)}
            sends = [
                num_bytes * self.micro_samples(layout) for num_bytes in self.costs_of(layout).sends_bytes
            ]
            bounds = [*cuts[:-1], len(sends)]
            self._stages[key] = tuple(
                join(rows[speed][a:b], sends[b - 1], *(seconds / speed for seconds in actions_s))
                for speed, (a, b) in zip(speeds, itertools.pairwise(bounds), strict=True)
            )
        return self._stages[key]

    def speeds_of_stages(self, layout: Layout) -> tuple[float, ...]:
        """Of who computes each stage."""
        along = self._places.speeds_along(layout)
        return tuple(along[w] for w in workers_of_stages(layout.schedule, layout.pp, layout.stages))

    def kind_of_row(self, layout: Layout) -> tuple[Any, ...]:
        """What layouts have in common whose blocks cost the same."""
        sharing = self.sharing_of(layout)
        return (
            layout.threads,
            min(layout.workers, self.linked.per_host),
            layout.tp,
            self.micro_samples(layout),
            layout.recompute,
            self.place(layout, "tp"),
            self.place(layout, "data"),
            1.0 if sharing is None else sharing.times,
        )

    def row(self, layout: Layout, speed: float = 1.0) -> list[Stage]:
        """Each block of the model as a stage of its own, on a host of this speed."""
        costs, micro = self.costs_of(layout), self.micro_samples(layout)
        computed = {id(b): self._compute(layout, b, micro, speed) for b in costs.blocks}
        return [computed[id(b)] for b in costs.model]

    def _compute(self, layout: Layout, block: Block, micro: float, speed: float) -> Stage:
        """One block as a stage of its own."""
        part = block.divided(layout.tp)
        assert part is not None
        forward_s, backward_s = self._block_s(layout, block, part, micro)
        sharing = self.sharing_of(layout)
        speed /= 1.0 if sharing is None else sharing.times
        forward_s, backward_s = forward_s / speed, backward_s / speed
        again = self._again(layout.recompute, block, micro)
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
            forward_tensor_s=forward_x,
            again_s=forward_s * again,
            num_blocks=1,
            largest_bytes=part.parameter_bytes,
            worst=(saved * micro, float(part.trained_bytes), peak * micro),
        )

    def _again(self, how: str, block: Block, samples: float) -> float:
        """What recomputation takes of a block's forward pass."""
        if how in self.profile.recomputed_shares:
            return between(self.profile.recomputed_shares[how], samples)
        return {"none": 0.0, "selective": block.selective_share, "full": 1.0}[how]

    def _block_s(
        self, layout: Layout, block: Block, part: Block | Division, micro: float
    ) -> tuple[float, float]:
        """Forward and backward of one worker, on the device that was measured; statistics over all workers included."""
        forward_s, backward_s = part.forward_s(micro), part.backward_s(micro)
        if layout.data_parallel == 1 or not block.statistics:
            return forward_s, backward_s
        more_s = self._statistics_s(block, self.place(layout, "data"))
        if part is block and block.forward_among_s is not None and block.backward_among_s is not None:
            # Measured among the workers of one host; over a cable their messages take longer.
            forward_s, backward_s = block.forward_among_s(micro), block.backward_among_s(micro)
            measured = Placement(hosts=1, per_host=max(2, self.costs_of(layout).active))
            more_s = max(0.0, more_s - self._statistics_s(block, measured))
        return forward_s + more_s / 2, backward_s + more_s / 2

    def _statistics_s(self, block: Block, place: Placement) -> float:
        """What a block exchanges in a micro-batch for statistics over all workers of a place."""
        workers = place.hosts * place.per_host
        return sum(
            self._places.seconds(kind, place, num_bytes * (workers if kind == "all-gather" else 1))
            for kind, num_bytes in block.statistics
        )

    def _exchange_s(self, exchanges: Sequence[tuple[str, float]], place: Placement, micro: float) -> float:
        return sum(self._places.seconds(kind, place, num_bytes * micro) for kind, num_bytes in exchanges)

    def _computing(self, layout: Layout, stages: tuple[Stage, ...], *, apart: bool) -> Terms:
        busy = [
            (
                layout.micro * sum(s.busy_s for s in mine),
                layout.micro * sum(s.tensor_s for s in mine),
                layout.micro * sum(s.overhead_s for s in mine),
            )
            for mine in _held(layout, stages)
        ]
        if layout.pp == 1:
            ((busy_s, tensor_s, _),) = busy
            return Terms(compute_s=busy_s - tensor_s, tensor_s=tensor_s)
        sends = self._pipelines.sending(layout, stages)
        sharing = self.sharing_of(layout)
        whole_s, worked_s = self._pipelines.play(layout, stages, sends, sharing)
        if worked_s:
            # Who waited has left its cores to the others.
            shares = [
                own_s / all_s if all_s else 0.0 for own_s, (all_s, _, _) in zip(worked_s, busy, strict=True)
            ]
            busy = [(a * by, b * by, c * by) for by, (a, b, c) in zip(shares, busy, strict=True)]
        busy_s, tensor_s, overhead_s = max(busy)
        without_s = whole_s
        if apart:
            without_s, _ = self._pipelines.play(layout, stages, Sending(), sharing)
        without_s = max(min(without_s, whole_s), busy_s)
        return Terms(
            compute_s=busy_s - tensor_s - overhead_s,
            tensor_s=tensor_s,
            overhead_s=overhead_s,
            bubble_s=without_s - busy_s,
            messages_s=whole_s - without_s,
        )

    def sharing_of(self, layout: Layout) -> Sharing | None:
        """How workers of a pipeline share cores; see `Pipelines.sharing`."""
        return self._pipelines.sharing(layout, self.costs_of(layout), self.micro_samples(layout))

    def parts(self, layout: Layout) -> Parts:
        """What the forecast of a layout is added up from."""
        stages = self.stages_of(layout)
        shard_bytes = stages[0].trained_bytes / layout.dp_shard if layout.pp == 1 else 0.0
        return Parts(
            stages=stages,
            sending=self._pipelines.sending(layout, stages) if layout.pp > 1 else Sending(),
            updating=tuple(self._updates(layout, stages)),
            copies_s=self._places.seconds("all-reduce", self.place(layout, "dp_replicate"), shard_bytes),
            sharing=self.sharing_of(layout),
        )

    def _updates(self, layout: Layout, stages: Sequence[Stage]) -> list[dict[str, float]]:
        """Of each worker of the pipeline: the terms between its gradients and its updated parameters."""
        costs, speeds = self.costs_of(layout), self._places.speeds_along(layout)
        return [
            self._updating(layout, costs, mine, speed)
            for mine, speed in zip(_held(layout, stages), speeds, strict=True)
        ]

    def _updating(
        self, layout: Layout, costs: Costs, mine: Sequence[Stage], speed: float
    ) -> dict[str, float]:
        row = functools.partial(self.row, layout, speed)
        return updating(self.profile, self._places, layout, costs, mine, row, speed)

    def memories(self, layout: Layout, cuts: Cuts | None = None) -> tuple[Memory, Memory]:
        """In steps and in evaluations: of the worker that needs most then.

        Args:
            cuts: None: as `cuts_of` says.
        """
        training, evaluating = zip(*self._memories(layout, cuts), strict=True)
        return max(training, key=_total), max(evaluating, key=_total)

    def needed_bytes(self, layout: Layout, cuts: Cuts | None = None) -> int:
        """Of its host's memory, a worker on average: on the host where that is most. On GPUs each has its own.

        Args:
            cuts: as of `memories`.
        """
        found = self._memories(layout, cuts)
        own = [max(training.own, evaluating.own) for training, evaluating in found]
        cluster = self.linked.cluster
        if layout.pp == 1 or cluster.device != "cpu":
            return max(own)
        workers = iter(range(layout.workers))
        hosts = [list(itertools.islice(workers, host.workers)) for host in cluster.hosts]
        each = layout.workers // layout.pp
        return max(round(sum(own[worker // each] for worker in here) / len(here)) for here in hosts if here)

    def _memories(self, layout: Layout, cuts: Cuts | None) -> list[tuple[Memory, Memory]]:
        """`memories`, of each worker of a pipeline."""
        cuts = self._cutting.of(layout) if cuts is None else cuts
        if (layout, cuts) not in self._held:
            self._held[layout, cuts] = self._find_memories(layout, cuts)
        return self._held[layout, cuts]

    def _find_memories(self, layout: Layout, cuts: Cuts) -> list[tuple[Memory, Memory]]:
        stages, stored = self._stages_cut(layout, cuts, self._actions_s(layout)), [1]
        if layout.pp > 1:
            stored = list(peak_stored(layout.schedule, layout.pp, layout.micro, layout.stages))
        sharers = self.place(layout, "data").per_host if one_copy(self.profile, self._places, layout) else 1
        held = [(tuple(mine), number) for mine, number in zip(_held(layout, stages), stored, strict=True)]
        found = {
            (mine, number): (
                training_memory(self.profile, layout, mine, stored=number, sharers=sharers),
                evaluation_memory(self.profile, layout, mine, sharers=sharers),
            )
            for mine, number in dict.fromkeys(held)
        }
        return [found[one] for one in held]


def _held(layout: Layout, stages: Sequence[Stage]) -> list[list[Stage]]:
    """The stages of each worker of the pipeline."""
    mine_of = stages_of_workers(layout.schedule, layout.pp, layout.stages)
    return [[stages[s] for s in mine] for mine in mine_of]


def _total(memory: Memory) -> int:
    return memory.total
