"""Forecasts of time and memory on one GPU against what is measured there, and paceline's steps against plain torch.

    python benchmarks/gpu.py --results DIR      # each job measured once, then all layouts of one worker; the tables
    python benchmarks/gpu.py --from DIR         # the tables again

A job is measured as by `paceline plan`. Then each layout of one worker (numbers of micro-batches, what is computed
again in the backward pass) is trained by itself, in two rounds, one after the other. Memory is what torch has allocated
on the device at most, and what the driver takes. The peers are a loop of plain PyTorch over the same batches, as it is
and compiled.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import gc
import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from peers import ROOT

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World, gather_cluster, join
from paceline.errors import LayoutError
from paceline.job import Job
from paceline.load import load_job
from paceline.measure.machine import describe_host, device_kind, peak_memory_bytes
from paceline.plan.forecast import Forecaster
from paceline.records import Layout
from paceline.train.image_format import agree_on_images
from paceline.train.planning import measure_all
from paceline.train.session import Datasets, Session
from paceline.train.step import StepResult

JOBS = {name: ("benchmarks/gpu_jobs.py", {"model": name}) for name in ("gpt", "conv", "mlp", "launches")}
CELLS = [
    ("gpt", "bf16"), ("gpt", "fp32"), ("conv", "bf16"), ("conv", "fp32"), ("mlp", "bf16"), ("mlp", "fp32"),
    ("launches", "fp32"), ("launches", "bf16"),
]  # fmt: skip
LAYOUTS = (
    "micro=1", "micro=2", "micro=4", "micro=8", "recompute=full", "recompute=full,micro=4", "recompute=selective",
    "recompute=selective,micro=4",
)  # fmt: skip
WARM_UP, FEWEST, ROUNDS, SECONDS = 3, 5, 2, 0.5
"""Steps that are not counted and the least that are; rounds, and how long each takes about."""
MIB = 1 << 20


@dataclasses.dataclass
class Cell:
    """One layout of one job."""

    job: str
    precision: str
    layout: str
    was_tried: bool = False
    forecast_s: float = 0.0
    error_s: float = 0.0
    bare_s: float = 0.0
    """The forecast without what only trials explain."""
    forecast_bytes: int = 0
    round_s: list[float] = dataclasses.field(default_factory=list)
    """Of each round the median step."""
    peak_bytes: int = 0
    reserved_bytes: int = 0
    trouble: str = ""

    @property
    def step_s(self) -> float:
        return median(self.round_s)

    @property
    def off(self) -> float:
        return self.forecast_s / self.step_s - 1

    @property
    def bytes_off(self) -> float:
        return self.forecast_bytes / self.peak_bytes - 1


@dataclasses.dataclass
class Result:
    """A job in one precision on one device."""

    job: str
    precision: str
    device: str = ""
    torch: str = ""
    date: str = ""
    measuring_s: float = 0.0
    cells: list[Cell] = dataclasses.field(default_factory=list)
    peers_s: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    """Of loops of plain PyTorch."""
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    linked: dict[str, Any] = dataclasses.field(default_factory=dict)

    @classmethod
    def read(cls, path: Path) -> Result:
        data = json.loads(path.read_text())
        return cls(cells=[Cell(**cell) for cell in data.pop("cells")], **data)


def now_s() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def timed(step: Callable[[], object]) -> float:
    """The median step, after a few that warm up."""
    for _ in range(WARM_UP):
        step()
    begin_s, found = now_s(), []
    while len(found) < FEWEST or now_s() - begin_s < SECONDS:
        before_s = now_s()
        step()
        found.append(now_s() - before_s)
    return median(found)


def emptied() -> None:
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()


def trained(job: Job, cell: Cell, world: World, datasets: Datasets) -> None:
    emptied()
    layout = Layout.parse(cell.layout)
    mesh = make_mesh(world, layout)
    session = Session(job, layout, world=world, mesh=mesh, datasets=datasets, precision=cell.precision)
    batches = session.batches(epochs=1_000_000)

    def step() -> StepResult:
        return session.step(next(batches))

    cell.round_s.append(timed(step))
    cell.peak_bytes = max(cell.peak_bytes, peak_memory_bytes("cuda"))
    cell.reserved_bytes = max(cell.reserved_bytes, torch.cuda.max_memory_reserved())


def plain(job: Job, precision: str, world: World, datasets: Datasets, *, compiled: bool) -> float:
    """A step of the loop that one writes without paceline: the whole batch at once, its loss asked for."""
    emptied()
    device = world.device
    model = job.model().to(device).train()
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    call = torch.compile(model) if compiled else model
    loader = torch.utils.data.DataLoader(
        datasets["train"], job.batch_size, shuffle=True, drop_last=True, pin_memory=True
    )

    def endless() -> Iterator[Sequence[torch.Tensor]]:
        while True:
            yield from loader

    batches = endless()

    def step() -> float:
        batch = [t.to(device, non_blocking=True) for t in next(batches)]
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16"):
            loss = job.loss(call(batch[0]), batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return float(loss)

    return timed(step)


def measure(name: str, precision: str, world: World, *, compiles: bool) -> Result:
    file, settings = JOBS[name]
    job = load_job(ROOT / file, settings)
    datasets = Datasets(job, 0)
    everyone = world.group(1)
    assert everyone is not None
    cluster = gather_cluster(everyone, world)
    result = Result(
        name, precision, cluster.hosts[0].device_name, torch.__version__, str(datetime.date.today())
    )
    begin_s = time.perf_counter()
    agree_on_images(job, datasets, world, everyone, seed=0, precision=precision)
    measured = measure_all(job, datasets, world, everyone, cluster, seed=0, precision=precision)
    assert measured is not None
    result.measuring_s = time.perf_counter() - begin_s
    profile, linked = measured
    result.profile, result.linked = profile.to_json(), linked.to_json()
    forecaster = Forecaster(profile, linked)
    tried = {one.layout for one in profile.tried}
    for text in LAYOUTS:
        layout = Layout.parse(text)
        cell = Cell(name, precision, text, was_tried=layout in tried)
        try:
            found = forecaster.forecast(layout)
        except LayoutError as error:
            cell.trouble = str(error).splitlines()[0]
        else:
            cell.forecast_s, cell.error_s, cell.forecast_bytes = (
                found.step_s,
                found.error_s,
                found.memory.total,
            )
            cell.bare_s = found.step_s - found.terms.unexplained_s
        result.cells.append(cell)
    ways = {"plain": False, **({"compiled": True} if compiles else {})}
    for _ in range(ROUNDS):
        for cell in (cell for cell in result.cells if not cell.trouble):
            try:
                trained(job, cell, world, datasets)
            except (LayoutError, torch.OutOfMemoryError) as error:
                cell.trouble = str(error).splitlines()[0]
        for way, compiled in ways.items():
            result.peers_s.setdefault(way, []).append(
                plain(job, precision, world, datasets, compiled=compiled)
            )
    return result


def table(results: Sequence[Result]) -> str:
    first = results[0]
    lines = [
        f"`python benchmarks/gpu.py`, {first.date}, {first.device}, torch {first.torch}; medians of {ROUNDS} rounds.",
        "",
        "| job | layout | forecast ms | measured ms | error | A/A | forecast MiB | measured MiB | error |",
        "|---" * 9 + "|",
    ]
    for result in results:
        for cell in result.cells:
            place = f"| {cell.job} {cell.precision} | {cell.layout}{' (tried)' * cell.was_tried} "
            if not cell.round_s:
                lines.append(f"{place}| {cell.trouble} |" + " |" * 6)
                continue
            noise = abs(cell.round_s[0] / cell.round_s[-1] - 1)
            lines.append(
                f"{place}| {cell.forecast_s * 1e3:.2f} | {cell.step_s * 1e3:.2f} | {cell.off:+.1%} | {noise:.1%} "
                f"| {cell.forecast_bytes / MIB:,.0f} | {cell.peak_bytes / MIB:,.0f} | {cell.bytes_off:+.1%} |"
            )
    cells = [cell for result in results for cell in result.cells if cell.round_s]
    untried = [cell for cell in cells if not cell.was_tried]
    for name, some, offs in (
        ("Step time", untried, [abs(cell.off) for cell in untried]),
        ("Step time without what trials explain", cells, [abs(c.bare_s / c.step_s - 1) for c in cells]),
        ("Peak memory", untried, [abs(cell.bytes_off) for cell in untried]),
    ):
        if some:
            which = "cells that were not tried" if some is untried else "cells"
            lines += ["", f"{name}: {len(some)} {which}, mean error {mean(offs):.1%}, most {max(offs):.1%}."]
    lines += ["", "| job | paceline ms | plain PyTorch | compiled | s to measure the job |", "|---" * 5 + "|"]
    for result in results:
        own = next((cell.step_s for cell in result.cells if cell.round_s), None)
        times = [
            own,
            *(median(result.peers_s[w]) if w in result.peers_s else None for w in ("plain", "compiled")),
        ]
        told = ["–" if s is None else f"{s * 1e3:.2f}" for s in times]
        lines.append(f"| {result.job} {result.precision} | {' | '.join(told)} | {result.measuring_s:.0f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--precisions", nargs="+", choices=("fp32", "bf16"), default=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true", help="time compiled plain PyTorch, too")
    parser.add_argument("--results", type=Path, metavar="DIR", help="keep a file for each job and precision")
    parser.add_argument("--from", dest="kept", type=Path, metavar="DIR", help="measure nothing")
    options = parser.parse_args()
    wanted = [cell for cell in CELLS if cell[0] in options.jobs and cell[1] in options.precisions]
    if options.kept is not None:
        paths = [options.kept / f"{job}-{precision}.json" for job, precision in wanted]
        results = [Result.read(path) for path in paths if path.exists()]
        if not results:
            sys.exit(f"{options.kept} has no results of these jobs")
        print(table(results))
        return
    if device_kind() != "cuda":
        sys.exit(f"there is no GPU: {describe_host('cpu', 1).device_name}")
    world = join("cuda", timeout_s=600)
    results = []
    for name, precision in wanted:
        results.append(measure(name, precision, world, compiles=options.compile))
        if options.results is not None:
            options.results.mkdir(parents=True, exist_ok=True)
            path = options.results / f"{name}-{precision}.json"
            path.write_text(json.dumps(dataclasses.asdict(results[-1]), indent=1))
        print(f"{time.strftime('%H:%M:%S')} {name} {precision} done", file=sys.stderr, flush=True)
    print(table(results))


if __name__ == "__main__":
    main()
