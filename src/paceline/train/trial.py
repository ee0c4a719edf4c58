"""Timing a few steps of the job itself in each candidate layout."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from statistics import median

import torch

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.threads import take_cores, threads_for
from paceline.comm.world import World
from paceline.job import Job
from paceline.records import Layout, Trial, describe
from paceline.train.data import GlobalBatch, ShareLoader
from paceline.train.replica import Replica, StepResult
from paceline.train.session import Datasets

BUDGET_S = 15.0
"""What timing all candidates may take, once each has run its first steps."""
_WARM_UP_STEPS = 2
_ROUND_S = 0.4
"""Steps of a candidate are repeated within a round until they took about this long."""
_MOST_STEPS, _FEWEST_ROUNDS, _MOST_ROUNDS = 50, 3, 7


@dataclasses.dataclass
class _Candidate:
    layout: Layout
    group: Group | None
    """None on a worker that the layout leaves idle."""
    batches: Iterator[GlobalBatch] | None = None
    steps_per_round: int = 1
    round_s: list[float] = dataclasses.field(default_factory=list)
    results: list[StepResult] = dataclasses.field(default_factory=list)


class LayoutTimer:
    """Times layouts in interleaved rounds (A B C, A B C, …), so that a machine whose speed drifts is fair to all.

    One replica serves all candidates: it is thrown away afterwards, since it has been trained on the
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
    ) -> None:
        self._job, self._world, self._datasets, self._seed = job, world, datasets, seed
        self._all = world.group(world.size)
        self._candidates = [_Candidate(layout, world.group(layout.workers)) for layout in layouts]
        self._replica = Replica(
            job, seed=seed, device=world.device, precision=precision, total_steps=job.steps or 1000
        )

    def run(self) -> list[Trial]:
        """Time all candidates; the same list on every worker, rank 0's measurements."""
        begin_s = time.perf_counter()
        for candidate in self._candidates:
            candidate.steps_per_round = _WARM_UP_STEPS
            self._round(candidate)
        warm_up_s = time.perf_counter() - begin_s
        expected_s = 0.0
        for candidate in self._candidates:
            candidate.steps_per_round = 1
            self._round(candidate)
            candidate.steps_per_round = max(1, min(_MOST_STEPS, round(_ROUND_S / candidate.round_s[-1])))
            expected_s += candidate.steps_per_round * candidate.round_s[-1]
            candidate.round_s.clear()
            candidate.results.clear()
        rounds = int((BUDGET_S - min(warm_up_s, BUDGET_S / 2)) / max(expected_s, 1e-6))
        for _ in range(max(_FEWEST_ROUNDS, min(_MOST_ROUNDS, rounds))):
            for candidate in self._candidates:
                self._round(candidate)
        return [self._trial(candidate) for candidate in self._candidates]

    def _round(self, candidate: _Candidate) -> None:
        """One round of one candidate: `round_s` gains its seconds per step, as rank 0 measured them."""
        assert self._all is not None
        step_s = torch.zeros(1, dtype=torch.float64, device=self._world.device)
        if candidate.group is not None:
            step_s[0] = self._steps(candidate, candidate.group)
        self._all.broadcast_(step_s, "the time of a trial")
        candidate.round_s.append(float(step_s))

    def _steps(self, candidate: _Candidate, group: Group) -> float:
        layout = candidate.layout
        take_cores(self._world.local_rank, min(self._world.local_size, layout.workers), layout.threads)
        self._replica.attach(data_mesh(group, layout))
        if candidate.batches is None:
            candidate.batches = self._endless(layout, group)
        group.barrier("before a trial")
        begin_s = time.perf_counter()
        results = [self._replica.step(next(candidate.batches)) for _ in range(candidate.steps_per_round)]
        group.barrier("after a trial")
        seconds = time.perf_counter() - begin_s
        candidate.results += results
        # Only whole batches are compared: an epoch's last one may be smaller.
        samples = sum(result.samples for result in results)
        return seconds * self._job.batch_size / samples

    def _endless(self, layout: Layout, group: Group) -> Iterator[GlobalBatch]:
        loader = ShareLoader(
            self._job,
            self._datasets["train"],
            seed=self._seed,
            micro=layout.micro,
            size=group.size,
            rank=group.rank,
            device=self._world.device,
        )
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    def _trial(self, candidate: _Candidate) -> Trial:
        layout, results = candidate.layout, candidate.results
        local = min(self._world.local_size, layout.workers)
        threads = threads_for(local, layout.threads)
        return Trial(
            layout=layout,
            label=describe(layout.workers, threads, self._world.device.type),
            workers=layout.workers,
            threads=threads,
            step_s=tuple(candidate.round_s),
            compute_s=median(r.compute_s for r in results) if results else None,
            communication_s=median(r.communication_s for r in results) if results else None,
            data_s=median(r.data_s for r in results) if results else None,
            optimizer_s=median(r.optimizer_s for r in results) if results else None,
        )
