"""Forecasts held against measurements, on this machine.

    python benchmarks/forecast.py --out forecast.md              # ten minutes
    python benchmarks/forecast.py --jobs text conv --rounds 9

For each job as many workers as there are cores measure what the planner needs (`paceline plan` does the same), and
then time every layout of the list in interleaved rounds, all in the same processes. A forecast is made of what was
measured before; nothing of the timed steps goes into it. Layouts that were tried while the job was measured are
marked, and not counted. Beside each error stands the noise of the measurement itself: half of the rounds against the
other half.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peers import JOBS, ROOT

from paceline.comm.world import join
from paceline.errors import LayoutError
from paceline.load import load_job
from paceline.measure.machine import describe_host, usable_cores
from paceline.plan.forecast import Forecaster
from paceline.records import Cluster, Layout
from paceline.train.allocator import keep_freed_memory
from paceline.train.planning import measure_all
from paceline.train.session import Datasets
from paceline.train.trial import LayoutTimer

CORES = len(usable_cores())


@dataclasses.dataclass
class Cell:
    """One layout of one job."""

    job: str
    layout: str
    forecast_s: float
    round_s: list[float]
    step_s: float | None
    """Median of all timed steps."""
    error: str = ""
    was_tried: bool = False
    """While the job was measured this layout was timed for a moment: its forecast is no forecast."""

    @property
    def measured_s(self) -> float:
        return self.step_s or median(self.round_s)

    @property
    def off(self) -> float:
        """Relative error of the forecast."""
        return self.forecast_s / self.measured_s - 1

    @property
    def noise(self) -> float:
        """Relative distance of the medians of every other round."""
        return abs(median(self.round_s[::2]) / median(self.round_s[1::2]) - 1)


def layouts_for(workers: int, batch_size: int) -> list[Layout]:
    """One process, and each way of splitting over all workers, with a few micro-batches."""
    n, threads = workers, max(1, CORES // workers)
    several = (
        f"dp_replicate={n}",
        f"dp_replicate={n},micro=2",
        f"dp_shard={n},zero=1",
        f"dp_shard={n},zero=3",
        f"dp_shard={n},micro=2,zero=3",
        f"tp={n}",
        f"tp={n},micro=2",
        f"pp={n},micro={2 * n}",
        f"pp={n},micro={4 * n}",
        f"pp={n},micro={n},schedule=gpipe",
        f"pp={n},micro={2 * n},schedule=zb-h1",
    )
    texts = ["dp_replicate=1,threads=1", f"dp_replicate=1,threads={CORES}"]
    found = [Layout.parse(text) for text in (*texts, *(f"{text},threads={threads}" for text in several))]
    return [layout for layout in found if batch_size % (layout.data_parallel * layout.micro) == 0]


def work(job_name: str, rounds: int, out: Path) -> None:
    """On each worker: measure, forecast, time."""
    file, settings = JOBS[job_name]
    job = load_job(ROOT / file, settings)
    world = join("cuda" if torch.cuda.is_available() else "cpu", timeout_s=300)
    everyone = world.group(world.size)
    assert everyone is not None
    keep_freed_memory()
    cluster = Cluster(hosts=(describe_host(world.device.type, world.local_size),))
    datasets = Datasets(job, 0)
    measured = measure_all(job, datasets, world, everyone, cluster, seed=0)
    wanted: list[tuple[str, float, bool]] = []
    if measured is not None:
        forecaster = Forecaster(*measured)
        tried = {one.layout for one in measured[0].tried}
        print(job_name, measured[0].action_s, measured[0].unexplained_s, measured[0].spread, file=sys.stderr)
        for layout in layouts_for(world.size, job.batch_size):
            try:
                wanted.append((str(layout), forecaster.forecast(layout).step_s, layout in tried))
            except LayoutError as error:
                print(f"{job_name}, {layout}: {error}", file=sys.stderr)
    wanted = [tuple(row) for row in everyone.gather_json(wanted, "forecasts")[0]]
    timer = LayoutTimer(
        job,
        [Layout.parse(text) for text, *_ in wanted],
        world,
        datasets,
        seed=0,
        precision="fp32",
        budget_s=1e4,
        rounds=(rounds, rounds),
    )
    trials = timer.run()
    if world.rank == 0:
        cells = [
            Cell(
                job_name, text, seconds, list(found.step_s), found.median_step_s, found.error or "", was_tried
            )
            for (text, seconds, was_tried), found in zip(wanted, trials, strict=True)
        ]
        out.write_text(json.dumps([dataclasses.asdict(cell) for cell in cells]))
    everyone.barrier("the end")
    world.leave()


def run(job_name: str, arguments: argparse.Namespace, folder: Path) -> list[Cell]:
    out = folder / f"{job_name}.json"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={CORES}"]
    command = [
        *torchrun,
        __file__,
        "--worker",
        job_name,
        "--rounds",
        str(arguments.rounds),
        "--out",
        str(out),
    ]
    process = subprocess.run(command, capture_output=True, text=True, timeout=1800, check=False)
    print(process.stderr[-2000:], file=sys.stderr)
    if process.returncode:
        sys.exit(f"{job_name}:\n{process.stdout}\n{process.stderr}")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return [Cell(**row) for row in found]


def table(cells: list[Cell], heading: str) -> str:
    lines = [
        heading,
        "",
        "| job | layout | forecast, ms | measured, ms | error | noise |",
        "|---" * 6 + "|",
    ]
    for cell in cells:
        if not cell.round_s:
            lines.append(f"| {cell.job} | {cell.layout} | {cell.forecast_s * 1e3:.2f} | {cell.error} | | |")
            continue
        lines.append(
            f"| {cell.job} | {cell.layout}{' (tried)' * cell.was_tried} | {cell.forecast_s * 1e3:.2f} "
            f"| {cell.measured_s * 1e3:.2f} | {cell.off:+.1%} | {cell.noise:.1%} |"
        )
    timed = [cell for cell in cells if cell.round_s]
    counted = [cell for cell in timed if not cell.was_tried]
    errors = sorted(abs(cell.off) for cell in counted)
    lines += [
        "",
        f"{len(counted)} cells that were not tried: mean error {mean(errors):.1%}, median {median(errors):.1%}, "
        f"95th percentile {errors[min(len(errors) - 1, int(0.95 * len(errors)))]:.1%}; "
        f"mean noise {mean(cell.noise for cell in counted):.1%}.",
        "",
        "| job | taken by forecast | fastest measured | time lost by the choice |",
        "|---" * 4 + "|",
    ]
    regrets = []
    for job in dict.fromkeys(cell.job for cell in timed):
        mine = [cell for cell in timed if cell.job == job]
        taken = min(mine, key=lambda cell: cell.forecast_s)
        best = min(mine, key=lambda cell: cell.measured_s)
        regrets.append(taken.measured_s / best.measured_s - 1)
        lines.append(f"| {job} | {taken.layout} | {best.layout} | {regrets[-1]:.1%} |")
    lines += ["", f"Mean of the time lost {mean(regrets):.1%}, most {max(regrets):.1%}."]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--worker", choices=JOBS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        work(arguments.worker, arguments.rounds, arguments.out)
        return
    cells: list[Cell] = []
    heading = (
        f"`python benchmarks/forecast.py`, {datetime.date.today()}, {CORES} cores, torch {torch.__version__}, "
        f"{arguments.rounds} rounds."
    )
    with tempfile.TemporaryDirectory() as folder:
        for job_name in arguments.jobs:
            cells += run(job_name, arguments, Path(folder))
            print(table(cells, heading), flush=True)
            if arguments.out:
                arguments.out.write_text(table(cells, heading))


if __name__ == "__main__":
    main()
