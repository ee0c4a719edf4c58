"""Forecasts of peak memory held against what new processes hold.

    python benchmarks/memory_forecast.py DIR                 # measure each job once, run its layouts; the table
    python benchmarks/memory_forecast.py DIR --table         # the tables again, of what DIR holds

Each job is measured once by as many workers as there are cores (what `paceline plan` does), which stays in DIR. Then
each layout trains eight steps in processes of its own (what `paceline train --no-verify` starts), evaluates, saves and
tells the most that each worker has held: resident memory, `VmHWM` of /proc, so that a page which two workers map counts
for both. The forecast is of the worst worker, and so is what is compared. Layouts of which the measuring processes
tried one for a moment are marked.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, median

import torch
from peers import JOBS as PEER_JOBS
from peers import ROOT

from paceline.errors import LayoutError
from paceline.launch.local import free_port
from paceline.launch.spec import RunSpec
from paceline.load import load_job
from paceline.measure.machine import usable_cores
from paceline.plan.forecast import Forecaster
from paceline.plan.kept import read_kept
from paceline.records import Layout

CORES = len(usable_cores())
JOBS = {
    **PEER_JOBS,
    "image-256": ("examples/image.py", {"data": "mnist", "batch_size": "256"}),
    "text-wide": ("examples/text.py", {"width": "128", "layers": "4", "batch_size": "32"}),
}
TUNED_ON = ("gpt-small", "conv", "text", "image", "driving", "mlp-wide", "text-wide", "gpt-30m")
"""The forecast was worked on with these, or their cells were looked at to find what it lacked; others are reported."""
REPORTED = ("speech", "image-256", "mlp-tiny")
STEPS = 8
TIMEOUT_S = 300.0
MIB = 1 << 20
PREPARE = """
import json, sys
from paceline.load import load_job

job = load_job(sys.argv[1], json.loads(sys.argv[2]))
print(len(job.data("train")), len(job.data("test")), "samples")
"""


def layouts_for(batch_size: int) -> list[Layout]:
    """Of one worker and of as many as there are cores, each with one thread, as far as the batch allows."""
    n = CORES
    texts = (
        "dp_replicate=1", "recompute=full", f"dp_replicate={n}", f"dp_replicate={n},micro=2", f"dp_shard={n},zero=3",
        f"tp={n}", f"pp={n},micro={2 * n}",
    )  # fmt: skip
    found = [Layout.parse(f"{text},threads=1") for text in texts]
    return [layout for layout in found if batch_size % (layout.data_parallel * layout.micro) == 0]


@dataclasses.dataclass
class Cell:
    """One layout of one job, trained."""

    job: str
    layout: str
    peak_bytes: list[int]
    """Of each worker, by rank."""
    error: str = ""


def spec_of(job: str, directory: Path, **more: object) -> RunSpec:
    file, settings = JOBS[job]
    return RunSpec(job_file=str(ROOT / file), settings=settings, out=str(directory), precision="fp32", **more)  # type: ignore[arg-type]


def command_of(spec: RunSpec) -> list[str]:
    return [sys.executable, "-m", "paceline.launch.worker", str(spec.write())]


def start(spec: RunSpec, workers: int) -> str:
    """Carry out `spec` with workers that this process starts; why it failed, or nothing."""
    port = free_port(None)
    processes = []
    for rank in range(workers):
        own = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": workers, "LOCAL_WORLD_SIZE": workers}
        place = {**own, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        processes.append(
            subprocess.Popen(
                command_of(spec),
                env={**os.environ, **{name: str(value) for name, value in place.items()}},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    errors = []
    try:
        for process in processes:
            _, told = process.communicate(timeout=TIMEOUT_S)
            errors.append(told.strip() if process.returncode else "")
    except subprocess.TimeoutExpired:
        errors.append(f"did not end within {TIMEOUT_S:.0f} s")
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return next((error for error in errors if error), "")


def measure(job: str, directory: Path) -> None:
    """Leave the job's profile in `directory`."""
    directory.mkdir(parents=True, exist_ok=True)
    # What data sets keep on disk is made in another process, as by `paceline plan` itself.
    file, settings = JOBS[job]
    prepare = [sys.executable, "-c", PREPARE, str(ROOT / file), json.dumps(settings)]
    subprocess.run(prepare, check=True)
    error = start(spec_of(job, directory, purpose="plan"), CORES)
    if error:
        sys.exit(f"{job} could not be measured: {error}")


def train(job: str, layout: Layout) -> Cell:
    """Train in new processes."""
    with tempfile.TemporaryDirectory() as place:
        spec = spec_of(job, Path(place), layout=str(layout), steps=STEPS, verify=False)
        error = start(spec, layout.workers)
        peaks = [] if error else peaks_told(Path(place))
    return Cell(job, str(layout), peaks, error.splitlines()[0] if error else "")


def peaks_told(directory: Path) -> list[int]:
    events = map(json.loads, (directory / "events.jsonl").read_text().splitlines())
    ranks = next(event["ranks"] for event in events if event["event"] == "ranks")
    return [rank["peak_memory_bytes"] for rank in ranks]


def kept(file: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def keep(file: Path, record: object) -> None:
    with file.open("a") as out:
        out.write(json.dumps(dataclasses.asdict(record)) + "\n")  # type: ignore[call-overload]


def run(jobs: Sequence[str], directory: Path) -> None:
    """Measure and train what `directory` does not hold yet."""
    file = directory / "cells.jsonl"
    done = {(cell["job"], cell["layout"]) for cell in kept(file)}
    for job in jobs:
        begin_s = time.time()
        if not (directory / job / "profile.json").exists():
            measure(job, directory / job)
        batch_size = load_job(*_job_of(job)).batch_size
        for layout in layouts_for(batch_size):
            if (job, str(layout)) not in done:
                cell = train(job, layout)
                keep(file, cell)
                told = [f"{peak / MIB:.0f}" for peak in cell.peak_bytes]
                print(f"{job} {layout}: {cell.error or ' and '.join(told) + ' MiB'}", flush=True)
        print(f"{job} took {time.time() - begin_s:.0f} s", flush=True)


def _job_of(job: str) -> tuple[Path, dict[str, str]]:
    file, settings = JOBS[job]
    return ROOT / file, settings


@dataclasses.dataclass(frozen=True)
class Row:
    """A forecast beside what was measured."""

    cell: Cell
    forecast_bytes: int
    was_tried: bool

    @property
    def measured_bytes(self) -> int:
        return max(self.cell.peak_bytes)

    @property
    def off(self) -> float:
        return self.forecast_bytes / self.measured_bytes - 1


def rows_of(directory: Path) -> list[Row]:
    forecasters: dict[str, Forecaster] = {}
    rows = []
    for found in kept(directory / "cells.jsonl"):
        cell = Cell(**found)  # type: ignore[arg-type]
        if cell.job not in forecasters:
            profile, linked = read_kept(directory / cell.job)
            assert linked is not None
            forecasters[cell.job] = Forecaster(profile, linked)
        forecaster, layout = forecasters[cell.job], Layout.parse(cell.layout)
        tried = {one.layout for one in forecaster.profile.tried}
        with contextlib.suppress(LayoutError):
            if not cell.error:
                needed = forecaster.forecast(layout).memory.total
                rows.append(Row(cell, needed, layout in tried))
    return rows


def told_of(name: str, rows: Sequence[Row]) -> str:
    errors = sorted(abs(row.off) for row in rows)
    if not errors:
        return ""
    return (
        f"{name}: {len(errors)} cells, mean error {mean(errors):.1%}, median {median(errors):.1%}, "
        f"95th percentile {errors[min(len(errors) - 1, int(0.95 * len(errors)))]:.1%}, most {errors[-1]:.1%}."
    )


def table(directory: Path) -> str:
    rows = rows_of(directory)
    lines = [
        f"`python benchmarks/memory_forecast.py`, {datetime.date.today()}, {CORES} cores, torch {torch.__version__}: "
        "MiB that the worst worker held at most, framework included.",
        "",
        "| job | layout | forecast | measured | error |",
        "|---" * 5 + "|",
    ]
    for row in rows:
        marks = ("*" if row.cell.job in TUNED_ON else "") + (" (tried)" if row.was_tried else "")
        lines.append(
            f"| {row.cell.job}{'*' if row.cell.job in TUNED_ON else ''} | {row.cell.layout}{marks.lstrip('*')} | "
            f"{row.forecast_bytes / MIB:.0f} | {row.measured_bytes / MIB:.0f} | {row.off:+.1%} |"
        )
    reported = [row for row in rows if row.cell.job not in TUNED_ON]
    lines += [
        "",
        told_of("Jobs with *, which the forecast was worked on with", [r for r in rows if r not in reported]),
        told_of("The others", reported),
        told_of("Of these, layouts that were not tried", [row for row in reported if not row.was_tried]),
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=[*TUNED_ON, *REPORTED])
    parser.add_argument("--table", action="store_true", help="measure nothing")
    arguments = parser.parse_args()
    arguments.directory.mkdir(parents=True, exist_ok=True)
    if not arguments.table:
        run(arguments.jobs, arguments.directory)
    print(table(arguments.directory))


if __name__ == "__main__":
    main()
