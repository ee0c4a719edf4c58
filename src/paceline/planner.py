"""`paceline plan` and `measure` from beginning to end: measure, or take what was measured; forecast, explain, draw."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.text import Text

from paceline.comm.world import resolve_transport
from paceline.errors import ClusterError
from paceline.launch.local import free_port, launch
from paceline.launch.preflight import preflight
from paceline.launch.spec import KEPT_FILE, RunSpec
from paceline.launch.worker import Worker
from paceline.load import load_job_file
from paceline.measure import store
from paceline.measure.machine import device_kind, local_workers
from paceline.plan.described import read_cluster
from paceline.plan.estimate import estimate
from paceline.plan.forecast import Forecaster
from paceline.plan.goal import time_to_goal
from paceline.plan.hardware import HARDWARE_FILE, Hardware
from paceline.plan.kept import CLUSTER_FILE, check_fits, read_kept, read_record
from paceline.plan.planned import planned
from paceline.plan.profile import LinkedCluster, Profile
from paceline.plan.scaling import scaling
from paceline.plan.search import search
from paceline.report import write_plan
from paceline.report.goals import print_goal
from paceline.report.hardware_text import print_hardware
from paceline.report.noise import known_noise
from paceline.report.plans import print_plan
from paceline.report.profile_text import print_profile
from paceline.run import new_directory, started_by_torchrun

_Read = TypeVar("_Read")
_Known = tuple[Profile, LinkedCluster | None, Path | None, str]
"""What was measured; the directory where it stays, if there is one; and what to say of where it is from."""


def plan(
    spec: RunSpec,
    console: Console,
    *,
    number: int,
    memory_bytes: int | None = None,
    port: int | None = None,
    cluster_file: Path | None = None,
    kept: Path | None = None,
    noise: float | Path | None = None,
    price: float | None = None,
) -> None:
    """Forecast the layouts of a job, and print the fastest ones, a step, the speed-up curve and what it advises.

    What was measured of the job here within the last week is taken, unless `spec.remeasure`, or a budget is given.

    With `spec.out` what was measured stays there, and `plan.json`, which holds what is printed, with a page and
    pictures.

    Under torchrun the machine is all hosts that it has started workers on; rank 0 prints.

    Args:
        number: of layouts to print.
        memory_bytes: that a worker may use; None: its share of its host's.
        cluster_file: describes another cluster, for which the plan is made; what was measured here is scaled to it.
        kept: the directory of an earlier plan, with what was measured for it; nothing is measured.
        noise: gradient noise scale in samples, or the directory of a run that has measured one: time to a target too.
        price: of a worker for an hour: cost of a target too.

    Raises:
        PacelineError: the job or a file is wrong, a worker failed, or no layout fits.
    """
    described = None if cluster_file is None else read_cluster(cluster_file)
    name = load_job_file(spec.job_file, spec.settings).name
    known = known_noise(noise, name)
    found_here = _measure(spec, port) if kept is None else _kept(spec, kept)
    if found_here is None:
        return
    profile, linked, directory, how_kept = found_here
    profile = profile.model_copy(update={"past_error": store.past_error()})
    notes = tuple(filter(None, (how_kept, profile.how_measured, profile.how_noisy)))
    if described is not None:
        scaled = estimate(profile, linked, described)
        profile, linked, notes = scaled.profile, scaled.linked, (*notes, *scaled.notes)
    elif linked is None:
        raise ClusterError(
            f"there is no {CLUSTER_FILE} beside {kept}",
            next_step="give --cluster FILE, or the directory that `paceline plan JOB --out DIR` has made",
        )
    forecaster = Forecaster(profile, linked, memory_bytes=memory_bytes)
    found = search(forecaster, number=number, memory_bytes=memory_bytes)
    curve = scaling(forecaster, memory_bytes=memory_bytes)
    whole = planned(forecaster, found, curve, job=name, memory_bytes=memory_bytes)
    print_plan(console, whole, notes)
    if known is not None or price is not None:
        scale, source = (known.samples, known.source) if known else (None, "")
        goal = time_to_goal(profile, linked, scale, price_per_worker_hour=price, memory_bytes=memory_bytes)
        print_goal(console, goal, source)
        whole = dataclasses.replace(whole, goal=goal, noise_source=source)
    told = whole.to_json()
    if described is not None:
        told |= {"described": described.to_json(), "cluster": linked.to_json(), "notes": list(notes)}
    if directory is not None:
        (directory / "plan.json").write_text(json.dumps(told, indent=2) + "\n")
        console.print(Text(f"\n{write_plan(whole, directory, notes)}"), soft_wrap=True)


def measure(spec: RunSpec, console: Console, *, port: int | None = None) -> None:
    """Measure the job of `spec`, or without one this machine, under torchrun all hosts; print what was found.

    Of a job it is kept where `paceline train` with the same job looks for it. With `spec.out` it stays there as JSON,
    as `plan(kept=…)` reads it.

    Raises:
        PacelineError: the job is wrong, or a worker failed.
    """
    if not spec.job_file:
        found = _with_workers(spec, port, lambda place: read_record(place / HARDWARE_FILE, Hardware))
        if found is not None:
            hardware, directory = found
            print_hardware(console, hardware)
            _say_where(console, directory)
        return
    measured = _measure(spec, port)
    if measured is None:
        return
    profile, linked, directory, _ = measured
    assert linked is not None
    print_profile(console, profile, linked)
    if profile.how_noisy:
        console.print("\nNot kept for paceline train, as the machine was busy.")
    else:
        console.print("\nKept for a week: paceline train of this job, as it is, need not measure it.")
    _say_where(console, directory)


def _say_where(console: Console, directory: Path | None) -> None:
    if directory is not None:
        console.print(Text(f"\n{directory}"), soft_wrap=True)


def _measure(spec: RunSpec, port: int | None) -> _Known | None:
    """What all workers measure, or find kept. None on others than the first."""
    found = _with_workers(spec, port, _read_measured)
    if found is None:
        return None
    (profile, linked, how_kept), directory = found
    return profile, linked, directory, how_kept


def _read_measured(place: Path) -> tuple[Profile, LinkedCluster | None, str]:
    marker = place / KEPT_FILE
    how_kept = ""
    if marker.exists():
        marker.unlink()
        how_kept = "Measured within the last week, and kept: --remeasure measures the job again."
    return *read_kept(place), how_kept


def _with_workers(
    spec: RunSpec, port: int | None, read: Callable[[Path], _Read]
) -> tuple[_Read, Path | None] | None:
    """What is read in the directory where all workers have measured; and that, if it stays."""
    as_worker = started_by_torchrun()
    is_first = not as_worker or int(os.environ["RANK"]) == 0
    workers = int(os.environ["WORLD_SIZE"]) if as_worker else local_workers(device_kind())
    if spec.job_file:
        preflight(spec, device_kind(), workers)
    else:
        resolve_transport(spec.transport, device_kind())
    directory = new_directory(spec) if spec.out and is_first else None
    place = directory or Path(tempfile.mkdtemp(prefix=f"paceline-{spec.purpose}-"))
    spec = spec.model_copy(update={"out": str(place)})
    if as_worker:
        Worker(spec).run()
    else:
        launch(spec.model_copy(update={"store_port": free_port(port)}), workers)
    found = read(place) if is_first else None
    if directory is None:
        shutil.rmtree(place)
    return None if found is None else (found, directory)


def _kept(spec: RunSpec, path: Path) -> _Known:
    """What was measured of the same job before; and a new directory, if `spec` has one."""
    loaded = load_job_file(spec.job_file, spec.settings)
    measured = read_kept(path)
    check_fits(measured[0], path, loaded.job.name or "job", loaded.job.batch_size)
    return *measured, new_directory(spec) if spec.out else None, ""
