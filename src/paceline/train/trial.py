"""Timing a few steps of the job itself in each candidate layout."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import math
import time
from collections.abc import Iterator, Sequence
from statistics import median

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh, make_mesh
from paceline.comm.threads import take_cores, threads_for
from paceline.comm.world import World
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.records import Layout, Trial, describe_layout
from paceline.train.allocator import give_back_freed_memory, heap_without_holes
from paceline.train.data import GlobalBatch, ShareLoader, few_samples, first_samples
from paceline.train.held_memory import ENOUGH_S, EVALUATED_BATCHES, FEWEST_STEPS, MOST_STEPS, Growth
from paceline.train.replica import Replica
from paceline.train.session import Datasets
from paceline.train.step import StepResult
from paceline.train.thrown_away import replica_to_measure

BUDGET_S = 15.0
"""What timing all candidates may take, once each has run its first steps."""
ROUND_S = 0.2
"""Steps of a candidate are repeated within a round until they took about this long."""
_WARM_UP_STEPS = 2
_SEVERAL_STEPS = 3
"""Of a round of so many the first, whose caches hold what the layout before it has used, does not tell what a step
takes in a training."""
_MOST_STEPS, _FEWEST_ROUNDS, _MOST_ROUNDS = 50, 3, 14


@dataclasses.dataclass
class _Candidate:
    layout: Layout
    mesh: Mesh | None
    """None on a worker that the layout leaves idle."""
    error: str | None = None
    """Why it cannot be timed."""
    batches: Iterator[GlobalBatch] | None = None
    steps_per_round: int = 1
    round_s: list[float] = dataclasses.field(default_factory=list)
    results: list[StepResult] = dataclasses.field(default_factory=list)
    grown_bytes: int | None = None
    """By which the memory of this worker grew at most, when it built the model and took its first steps, where this
    candidate was the first of its replica."""
    evaluation_grown_bytes: int | None = None
    """By which it grew then until it had evaluated a few batches."""


def time_by_turns(
    groups: Sequence[Sequence[Layout]],
    job: Job,
    world: World,
    everyone: Group,
    datasets: Datasets,
    *,
    seed: int,
    precision: str,
    budget_s: float = BUDGET_S,
    rounds: tuple[int, int] = (_FEWEST_ROUNDS, _MOST_ROUNDS),
    round_s: float = ROUND_S,
    fewest_steps: int = 1,
    evaluates: bool = False,
    until_s: float = math.inf,
) -> list[Trial]:
    """Time the layouts that rank 0 gives, those of a group in interleaved rounds; the same list on every worker.

    A collective call of all workers.

    Args:
        groups: layouts whose models can be in memory at the same time; looked at on rank 0 alone.
        budget_s, rounds, round_s, fewest_steps, evaluates: as of `LayoutTimer`, for all of them together.
        until_s: of `time.monotonic` on rank 0: no group is begun later, and the others are left out.
    """
    told = [[str(layout) for layout in group] for group in groups]
    texts: list[list[str]] = everyone.gather_json(told, "layouts to time")[0]
    number = sum(map(len, texts))
    trials: list[Trial] = []
    for at, group in enumerate(texts):
        if everyone.gather_json(time.monotonic() > until_s, "whether more layouts are timed")[0]:
            break
        _leave_room(world, everyone)
        timer = LayoutTimer(
            job,
            [Layout.parse(text) for text in group],
            world,
            datasets,
            seed=seed,
            precision=precision,
            budget_s=budget_s * len(group) / number,
            rounds=rounds,
            round_s=round_s,
            fewest_steps=fewest_steps,
            evaluates=evaluates,
        )
        trials += [trial.model_copy(update={"group": at}) for trial in timer.run()]
    _leave_room(world, everyone)
    return trials


def _leave_room(world: World, everyone: Group) -> None:
    """Have what all workers have freed given back, that of those too whom the next layout leaves out."""
    gc.collect()  # models and their hooks refer to each other
    world.forget_rooms()
    give_back_freed_memory()
    everyone.barrier("memory is given back")


class LayoutTimer:
    """Times layouts in interleaved rounds (A B C, A B C, …), so that a machine whose speed drifts is fair to all.

    The replicas, one for each way of splitting, are thrown away afterwards, since they have been trained on the
    way. A collective object: every worker of the world makes the same calls, idle ones included.
    """

    def __init__(
        self,
        job: Job,
        layouts: Sequence[Layout],
        world: World,
        datasets: Datasets,
        *,
        seed: int,
        precision: str,
        budget_s: float = BUDGET_S,
        rounds: tuple[int, int] = (_FEWEST_ROUNDS, _MOST_ROUNDS),
        round_s: float = ROUND_S,
        fewest_steps: int = 1,
        evaluates: bool = False,
    ) -> None:
        """
        Args:
            evaluates: find out what steps and an evaluation hold, before the first round.
            budget_s: about what all of it may take, once each layout has run its first steps.
            rounds: how many at least, and at most.
            round_s: about what steps of a layout take in a round at most.
            fewest_steps: of a round, whatever they take.
        """
        self._budget_s, self._rounds, self._fewest_steps = budget_s, rounds, fewest_steps
        self._round_s = min(round_s, budget_s / 2 / max(1, len(layouts)) / rounds[0])
        self._job, self._world, self._datasets, self._seed = job, world, datasets, seed
        self._all = world.group(world.size)
        self._precision, self._evaluates = precision, evaluates
        self._replicas: dict[Layout, Replica] = {}
        """By what `_key` makes of layouts."""
        self._candidates = [_Candidate(layout, make_mesh(world, layout)) for layout in layouts]

    def run(self) -> list[Trial]:
        """Time all candidates; the same list on every worker, rank 0's measurements."""
        with heap_without_holes() if self._evaluates else contextlib.nullcontext():
            self._time()
            self._take_worst()
            trials = [self._trial(candidate) for candidate in self._candidates]
            self._replicas.clear()
            gc.collect()  # models and their hooks refer to each other
        return trials

    def _time(self) -> None:
        begin_s = time.perf_counter()
        for candidate in self._candidates:
            candidate.steps_per_round = _WARM_UP_STEPS
            self._round(candidate)
        warm_up_s = time.perf_counter() - begin_s
        expected_s = 0.0
        timed = [candidate for candidate in self._candidates if candidate.error is None]
        for candidate in timed:
            candidate.steps_per_round = 1
            self._round(candidate)
            fitting = min(_MOST_STEPS, round(self._round_s / candidate.round_s[-1]))
            candidate.steps_per_round = max(self._fewest_steps, fitting)
            expected_s += candidate.steps_per_round * candidate.round_s[-1]
            # One step is a whole round of a slow layout.
            kept = 1 if candidate.steps_per_round == 1 else 0
            del candidate.round_s[: len(candidate.round_s) - kept]
            del candidate.results[: len(candidate.results) - kept]
        budget_s = self._budget_s
        own = int((budget_s - min(warm_up_s, budget_s / 2)) / max(expected_s, 1e-6))
        # Workers have warmed up for different times.
        assert self._all is not None
        rounds = self._all.gather_json(own, "rounds of trials")[0]
        fewest, most = self._rounds
        rounds = max(fewest, min(most, rounds))
        for count in range(rounds):
            for candidate in timed:
                if len(candidate.round_s) <= count:
                    self._round(candidate)

    def _round(self, candidate: _Candidate) -> None:
        """One round of one candidate: `round_s` gains its seconds per step, as rank 0 measured them."""
        assert self._all is not None
        told: tuple[float, str | None] = 0.0, None
        if candidate.mesh is not None:
            try:
                told = self._steps(candidate, candidate.mesh), None
            except LayoutError as error:
                # Every worker of the layout finds this out, before the end of its first step.
                told = 0.0, str(error).splitlines()[0]
            except Exception as error:
                # Others of the layout may wait for this worker in the middle of a step: there is no way on.
                error.add_note(f"while {candidate.layout} was tried; a run with --layout tries none")
                raise
        step_s, candidate.error = self._all.gather_json(told, "the time of a trial")[0]
        if candidate.error is None:
            candidate.round_s.append(step_s)
        elif candidate.layout.pp > 1:
            # Stages find it out at different places: one may have sent what another does not receive.
            if candidate.mesh is not None:
                candidate.mesh.pipeline.forget_messages()
            self._all.barrier("after a layout that cannot be tried")

    def _steps(self, candidate: _Candidate, mesh: Mesh) -> float:
        layout, group = candidate.layout, mesh.everyone
        take_cores(self._world.local_rank, min(self._world.local_size, layout.workers), layout.threads)
        growth = Growth(self._world.device) if self._is_first(layout) else None
        replica = self._replica_of(layout, mesh)
        if candidate.batches is None:
            candidate.batches = self._endless(layout, mesh.data)
        steps = candidate.steps_per_round
        if growth is not None:
            self._hold(candidate, replica, group, growth)
            steps = 1  # it has warmed up
        group.barrier("before a trial")
        begin_s = time.perf_counter()
        results = [replica.step(next(candidate.batches)) for _ in range(steps)]
        group.barrier("after a trial")
        seconds = time.perf_counter() - begin_s
        candidate.results += results[1:] if steps >= _SEVERAL_STEPS else results
        # Only whole batches are compared: an epoch's last one may be smaller.
        samples = sum(result.samples for result in results)
        return seconds * self._job.batch_size / samples

    def _is_first(self, layout: Layout) -> bool:
        """Whether its replica is to be built, and what that holds to be found out."""
        return self._evaluates and self._key(layout) not in self._replicas

    def _hold(self, candidate: _Candidate, replica: Replica, group: Group, growth: Growth) -> None:
        """Find out what steps hold, then an evaluation, as of a training that begins."""
        assert candidate.batches is not None
        begin_s = time.perf_counter()
        for count in range(1, MOST_STEPS + 1):
            replica.step(next(candidate.batches))
            late = count >= FEWEST_STEPS and time.perf_counter() - begin_s > ENOUGH_S
            if group.gather_json(late, "steps of a trial")[0]:
                break
        candidate.grown_bytes = growth.most_bytes()
        growth.begin_anew()
        self._evaluate(replica, max(EVALUATED_BATCHES, 2 * candidate.layout.pp))
        candidate.evaluation_grown_bytes = growth.most_bytes()
        growth.begin_anew()

    def _evaluate(self, replica: Replica, batches: int) -> None:
        together = self._job.evaluation_batch_size or self._job.batch_size
        replica.evaluate(first_samples(self._datasets["test"], "test", batches * together))

    def _replica_of(self, layout: Layout, mesh: Mesh) -> Replica:
        key = self._key(layout)
        if key not in self._replicas:
            replica = replica_to_measure(
                self._job,
                self._datasets,
                seed=self._seed,
                device=self._world.device,
                precision=self._precision,
                in_parts=layout.splits_model,
            )
            if layout.splits_model:
                replica.split(mesh, few_samples(self._job, self._datasets["train"], self._world.device))
            else:
                replica.attach(mesh)
            self._replicas[key] = replica
        return self._replicas[key]

    def _key(self, layout: Layout) -> Layout:
        """Layouts that differ in their threads alone have one replica, or, without a pipeline, in micro-batches."""
        return layout.model_copy(update={"threads": None, "micro": layout.micro if layout.pp > 1 else 1})

    def _take_worst(self) -> None:
        """Of each candidate the growth of the worker whose memory grew most, on all workers."""
        assert self._all is not None
        for name in ("grown_bytes", "evaluation_grown_bytes"):
            rows = self._all.gather_json([getattr(c, name) for c in self._candidates], "memory of trials")
            for candidate, grown in zip(self._candidates, zip(*rows, strict=True), strict=True):
                known = [num_bytes for num_bytes in grown if num_bytes is not None]
                setattr(candidate, name, max(known, default=None))

    def _endless(self, layout: Layout, group: Group) -> Iterator[GlobalBatch]:
        return ShareLoader(
            self._job,
            self._datasets["train"],
            seed=self._seed,
            micro=layout.micro,
            size=group.size,
            rank=group.rank,
            device=self._world.device,
        ).endless()

    def _trial(self, candidate: _Candidate) -> Trial:
        layout, results = candidate.layout, candidate.results
        local = min(self._world.local_size, layout.workers)
        threads = threads_for(local, layout.threads)
        return Trial(
            layout=layout,
            label=describe_layout(layout, threads, self._world.device.type),
            workers=layout.workers,
            threads=threads,
            step_s=tuple(candidate.round_s),
            median_step_s=median(r.step_s for r in results) if results else None,
            compute_s=median(r.compute_s for r in results) if results else None,
            communication_s=median(r.communication_s for r in results) if results else None,
            data_s=median(r.data_s for r in results) if results else None,
            optimizer_s=median(r.optimizer_s for r in results) if results else None,
            grown_bytes=candidate.grown_bytes,
            evaluation_grown_bytes=candidate.evaluation_grown_bytes,
            error=candidate.error,
        )
