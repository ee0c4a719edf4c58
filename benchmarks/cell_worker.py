"""What each worker of a pair does (cells.py): measure the job and the cluster, forecast, then time.

All forecasts are made before the first layout of the space is timed. Layouts are timed in interleaved rounds, as many
at a time as memory allows, the fast ones first. Slow ones follow one by one with two rounds, as long as there is time.
Those that are nearly the fastest, and the planner's choice, are timed once more then, with twice as many rounds: what
is least of many is so by chance, too, the more the less quiet a machine is. What the choice loses is told by these.
"""

from __future__ import annotations

import ctypes
import dataclasses
import datetime
import json
import math
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from cell_clusters import CLUSTERS
from cell_space import curve_space, rules_of_thumb, whole_space
from cells import JOBS, PROGRESS, Cell, Pair
from peers import ROOT

from paceline.comm.group import Group
from paceline.comm.world import World, gather_cluster, join
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.load import load_job
from paceline.measure.machine import available_memory_bytes, device_kind
from paceline.plan.forecast import Forecaster
from paceline.plan.scaling import scaling
from paceline.plan.search import search
from paceline.records import Layout
from paceline.train.allocator import keep_freed_memory
from paceline.train.image_format import agree_on_images
from paceline.train.matmul_choice import agree_on_matmul
from paceline.train.planning import measure_all
from paceline.train.session import Datasets
from paceline.train.trial import LayoutTimer

SLOW_TIMES, CHEAP_S, SLOW_S = 6.0, 0.2, 3.0
"""A layout is slow whose forecast is so many times the fastest, and not cheap; or longer than a limit."""
SLOW_ROUNDS, SLOW_STEPS = 2, 5
"""Of a slow layout; and its steps in all, those that warm up included."""
ROUND_STEPS = 3
"""Of a round, at least, of the fast ones: the first step finds the caches cold, and the median is another."""
BUILDING_S = 3.0
"""About what building a model's parts takes."""
SHARE_OF_MEMORY, SHARE_OF_LIMIT = 0.5, 0.75
"""Of what is available, that layouts timed together may take; of the pair's time, after which no slow one is begun."""
CLOSE, MOST_AGAIN, AGAIN_TIMES = 0.1, 6, 2
"""Layouts within so much of the fastest are timed once more, at most so many, with so many times the rounds."""
_PR_SET_PDEATHSIG = 1


@dataclasses.dataclass(frozen=True)
class Task:
    """What `cells.py` asks for."""

    job: str
    cluster: str
    rounds: int
    timing_s: float
    limit_s: float
    out: str


class Batch(NamedTuple):
    """Cells that are timed together."""

    cells: list[Cell]
    is_slow: bool


def batches(cells: Sequence[Cell], bytes_of: dict[str, float], room_bytes: float) -> Iterator[Batch]:
    """The fast ones, as many at a time as there is room for; then the slow ones; last those without a forecast."""
    forecasts_s = [cell.forecast_s for cell in cells if cell.forecast_s is not None]
    slow_s = min(SLOW_S, max(CHEAP_S, SLOW_TIMES * min(forecasts_s))) if forecasts_s else 0.0
    fast = [cell for cell in cells if cell.forecast_s is not None and cell.forecast_s <= slow_s]
    together: list[Cell] = []
    for cell in fast:
        if together and sum(bytes_of[one.layout] for one in (*together, cell)) > room_bytes:
            yield Batch(together, is_slow=False)
            together = []
        together.append(cell)
    if together:
        yield Batch(together, is_slow=False)
    rest = [cell for cell in cells if cell not in fast]
    for cell in sorted(rest, key=lambda cell: (cell.forecast_s is None, cell.forecast_s or 0.0)):
        yield Batch([cell], is_slow=True)


def contenders(pair: Pair) -> list[Cell]:
    """What may be the fastest, by what was measured, and the planner's choice; none where that has no rival."""

    def seconds(cell: Cell) -> float:
        return cell.measured_s or math.inf

    timed = sorted(pair.timed, key=seconds)
    close = [cell for cell in timed[:MOST_AGAIN] if seconds(cell) <= (1 + CLOSE) * seconds(timed[0])]
    chosen = pair.cell(pair.choice)
    if chosen is not None and chosen not in close:
        close = [*close[: MOST_AGAIN - 1], chosen]
    return close if len(close) > 1 else []


class PairWorker:
    """One worker's part of a pair. Rank 0 decides and writes."""

    def __init__(self, task: Task, job: Job, world: World, everyone: Group) -> None:
        self._task, self._job, self._world, self._everyone = task, job, world, everyone
        self._begin_s = time.monotonic()
        self._datasets = Datasets(job, 0)
        self._pair = Pair(
            task.job,
            task.cluster,
            date=str(datetime.date.today()),
            torch=torch.__version__,
            rounds=task.rounds,
            batch_size=job.batch_size,
        )
        self._bytes_of: dict[str, float] = {}

    def run(self) -> None:
        self._forecast()
        self._keep("measuring")
        room = SHARE_OF_MEMORY * available_memory_bytes(self._world.device.type)
        plan = list(batches(self._pair.cells, self._bytes_of, room))
        number = self._everyone.gather_json(len(plan), "what is timed")[0]
        for at in range(number):
            self._time(plan[at] if plan else Batch([], is_slow=False))
            self._keep("timing")
        if not CLUSTERS[self._task.cluster].is_curve:
            self._time_again()
            self._keep("timing")

    def _forecast(self) -> None:
        world, job = self._world, self._job
        cluster = gather_cluster(self._everyone, world)
        agree_on_matmul(job, self._datasets, world, self._everyone, seed=0)
        agree_on_images(job, self._datasets, world, self._everyone, seed=0, precision="fp32")
        measured = measure_all(job, self._datasets, world, self._everyone, cluster, seed=0)
        if measured is None:
            return
        profile, linked = measured
        forecaster, pair = Forecaster(profile, linked), self._pair
        pair.profile, pair.linked = profile.to_json(), linked.to_json()
        choice = search(forecaster, number=1).fastest[0].layout
        pair.choice = str(choice)
        pair.rules = {rule: str(x) for rule, x in rules_of_thumb(cluster, job.batch_size).items()}
        if CLUSTERS[pair.cluster].is_curve:
            layouts = curve_space(forecaster)
            curve = scaling(forecaster)
            pair.curve = [(p.workers, str(p.forecast.layout), p.forecast.step_s) for p in curve.points]
            layouts += [p.forecast.layout for p in curve.points]
        else:
            layouts = whole_space(cluster, job.batch_size)
        tried = {one.layout for one in profile.tried}
        for layout in dict.fromkeys([*layouts, choice]):
            cell = Cell(pair.job, pair.cluster, str(layout), was_tried=layout in tried)
            try:
                found = forecaster.forecast(layout)
            except LayoutError as error:
                cell.trouble = f"no forecast: {str(error).splitlines()[0]}"
            else:
                cell.forecast_s, cell.error_s = found.step_s, found.error_s
                cell.terms = {name: s for name, s in found.terms.to_json().items() if s}
                self._bytes_of[cell.layout] = layout.workers * (found.memory.total - found.memory.base)
            pair.cells.append(cell)

    def _time(self, batch: Batch) -> None:
        """Unless it is slow and there is no time left. A collective call; rank 0's batch counts."""
        cells, task = batch.cells, self._task
        if batch.is_slow and not self._has_time_for(cells[0]):
            expected_s = cells[0].forecast_s
            why = "nobody knows how long" if expected_s is None else f"by forecast {expected_s:.1f} s a step"
            cells[0].trouble = f"not measured: no time was left ({why})"
            cells = []
        if batch.is_slow:
            self._time_cells(cells, SLOW_ROUNDS, 1.0, 1)
        else:
            self._time_cells(cells, task.rounds, task.timing_s, ROUND_STEPS)

    def _time_again(self) -> None:
        """Those that may be the fastest. A collective call."""
        task, pair = self._task, self._pair
        pair.again = [dataclasses.replace(cell) for cell in contenders(pair)]
        self._time_cells(pair.again, AGAIN_TIMES * task.rounds, task.timing_s / 2, ROUND_STEPS)

    def _time_cells(self, cells: Sequence[Cell], rounds: int, timing_s: float, fewest_steps: int) -> None:
        """A collective call; what rank 0 says counts."""
        told = [cell.layout for cell in cells], rounds, timing_s, fewest_steps
        layouts, rounds, timing_s, fewest_steps = self._everyone.gather_json(told, "the layouts to time")[0]
        if not layouts:
            return
        # The timer gives all rounds half of its budget.
        timer = LayoutTimer(
            self._job,
            [Layout.parse(text) for text in layouts],
            self._world,
            self._datasets,
            seed=0,
            precision="fp32",
            budget_s=2 * timing_s,
            rounds=(rounds, rounds),
            fewest_steps=fewest_steps,
        )
        trials = timer.run()
        for cell, trial in zip(cells, trials, strict=False):
            cell.round_s, cell.median_step_s = list(trial.step_s), trial.median_step_s
            if trial.error:
                cell.trouble = trial.error

    def _has_time_for(self, cell: Cell) -> bool:
        step_s = cell.forecast_s if cell.forecast_s is not None else SLOW_S
        taken_s = time.monotonic() - self._begin_s
        return taken_s + BUILDING_S + SLOW_STEPS * step_s < SHARE_OF_LIMIT * self._task.limit_s

    def _keep(self, what: str) -> None:
        """What there is so far, on disk."""
        if self._world.rank != 0:
            return
        pair, taken_s = self._pair, time.monotonic() - self._begin_s
        pair.seconds[what] = taken_s - (pair.seconds.get("measuring", 0.0) if what == "timing" else 0.0)
        pair.write(Path(self._task.out))
        print(
            f"{PROGRESS}{taken_s:.0f} s: {len(pair.timed)} of {len(pair.cells)} layouts timed",
            file=sys.stderr,
        )
        sys.stderr.flush()


def main() -> None:
    if sys.platform == "linux":
        # Nothing works on unseen when the benchmark is killed.
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    task = Task(**json.loads(sys.argv[1]))
    file, settings = JOBS[task.job]
    job = load_job(ROOT / file, settings)
    world = join(device_kind(), timeout_s=task.limit_s)
    everyone = world.group(world.size)
    assert everyone is not None
    keep_freed_memory()
    PairWorker(task, job, world, everyone).run()
    everyone.barrier("the end")
    world.leave()


if __name__ == "__main__":
    main()
