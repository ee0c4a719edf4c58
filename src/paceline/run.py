"""`paceline train` and `verify` from beginning to end: check, start workers, show progress, report."""

from __future__ import annotations

import contextlib
import datetime
import os
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console

from paceline.errors import LaunchError, LayoutError, PacelineError, RunError
from paceline.events import EventWriter
from paceline.launch.local import free_port, launch
from paceline.launch.preflight import preflight
from paceline.launch.spec import AUTO, RunSpec
from paceline.launch.worker import Worker
from paceline.measure.machine import device_kind, local_workers
from paceline.records import Layout
from paceline.report import write_report
from paceline.report.proofs import print_proof
from paceline.report.reader import follow, read_log
from paceline.report.summary import print_summary
from paceline.report.tensorboard import TensorBoardWriter
from paceline.report.terminal import make_display


def train(spec: RunSpec, console: Console, *, quiet: bool, port: int | None = None) -> Path:
    """Carry out `spec`; `spec.out` may be empty for a new directory below `runs/`. Returns the run's directory.

    Raises:
        PacelineError: what failed; the run's directory holds what was done until then.
        KeyboardInterrupt: interrupted; weights and report were written.
    """
    device = device_kind()
    if started_by_torchrun():
        return _train_as_worker(spec, console, quiet=quiet)
    most = local_workers(device)
    loaded = preflight(spec, device, most)
    num_workers = most if spec.layout == AUTO else Layout.parse(spec.layout).workers
    if num_workers < 1:
        raise LaunchError(
            "this host has no device to train on", next_step="see `nvidia-smi`, or hide the GPUs"
        )
    directory = new_directory(spec, loaded.name)
    spec = spec.model_copy(update={"out": str(directory), "store_port": free_port(port)})
    _carry_out(directory, console, quiet, lambda: launch(spec, num_workers))
    return directory


def verify(spec: RunSpec, console: Console, *, port: int | None = None) -> bool:
    """Prove the layout of `spec`, print the comparison; whether it computes what one process does.

    Raises:
        PacelineError: the layout or the job is wrong, or a worker failed.
    """
    layout = _one_layout(spec)
    workers = int(os.environ["WORLD_SIZE"]) if started_by_torchrun() else local_workers(device_kind())
    preflight(spec, device_kind(), workers)
    directory = Path(tempfile.mkdtemp(prefix="paceline-verify-"))
    spec = spec.model_copy(update={"out": str(directory)})
    if started_by_torchrun():
        Worker(spec).run()
    else:
        spec = spec.model_copy(update={"store_port": free_port(port)})
        launch(spec, layout.workers)
    log = read_log(directory / "events.jsonl") if (directory / "events.jsonl").exists() else None
    # Where something failed the directory stays, as the error names its logs.
    shutil.rmtree(directory)
    if log is None or log.proof is None:
        return True  # a worker of torchrun other than the first: that one tells
    print_proof(console, log.proof)
    return log.proof.status == "equal"


def _one_layout(spec: RunSpec) -> Layout:
    if spec.layout == AUTO:
        raise LayoutError(
            "--layout auto is no layout to verify", next_step="give one, such as --layout dp_replicate=2"
        )
    return Layout.parse(spec.layout)


def started_by_torchrun() -> bool:
    """Whether this process is one of several workers that a launcher has started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def _train_as_worker(spec: RunSpec, console: Console, *, quiet: bool) -> Path:
    """One of torchrun's workers: rank 0 also shows the progress and writes the report."""
    rank = int(os.environ["RANK"])
    loaded = preflight(spec, device_kind(), int(os.environ["WORLD_SIZE"]))
    if rank != 0:
        # Only errors are written here, for whoever looks at this host.
        directory = Path(spec.out or "runs") / f"rank{rank}"
        spec = spec.model_copy(update={"out": str(directory)})
        directory.mkdir(parents=True, exist_ok=True)
        Worker(spec).run()
        return directory
    directory = new_directory(spec, loaded.name)
    spec = spec.model_copy(update={"out": str(directory)})
    spec.write()
    _carry_out(directory, console, quiet, lambda: Worker(spec).run())
    return directory


def _carry_out(directory: Path, console: Console, quiet: bool, work: Callable[[], None]) -> None:
    """Do the work while its events are shown; then close the record and write the report."""
    begin_s = time.time()
    try:
        with _shown(directory, console, quiet):
            try:
                work()
            except PacelineError as error:
                _end_failed(directory, begin_s, error)
                raise
    finally:
        _report(directory, console, quiet)


def _report(directory: Path, console: Console, quiet: bool) -> None:
    events = directory / "events.jsonl"
    if not events.exists():
        return
    log = read_log(events)
    if log.steps:
        write_report(directory)
    if not quiet:
        print_summary(console, log)


@contextlib.contextmanager
def _shown(directory: Path, console: Console, quiet: bool) -> Iterator[None]:
    """Follow the run's events in a thread: to the terminal and to TensorBoard's files."""
    stop = threading.Event()

    def show() -> None:
        display = make_display(console, quiet)
        mirror = TensorBoardWriter(directory / "tensorboard")
        try:
            for event in follow(directory / "events.jsonl", stop):
                display.on_event(event)
                mirror.on_event(event)
        finally:
            display.close()
            mirror.close()

    thread = threading.Thread(target=show, name="paceline-display", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(timeout=30)


def _end_failed(directory: Path, begin_s: float, error: PacelineError) -> None:
    """The run's last event, where the workers could not write it."""
    events = directory / "events.jsonl"
    log = read_log(events) if events.exists() else None
    if log is not None and log.end is not None:
        return
    steps = log.steps if log is not None else ()
    train_s = steps[-1].elapsed_s if steps else 0.0
    samples = sum(step.samples for step in steps)
    writer = EventWriter(events)
    writer.write(
        "end",
        status="failed",
        steps=len(steps),
        train_s=train_s,
        evaluation_s=sum(e.evaluation_s for e in log.evaluations) if log is not None else 0.0,
        total_s=time.time() - begin_s,
        samples=samples,
        samples_per_s=samples / train_s if train_s else None,
        metrics={},
        weights=None,
        forecast_step_s=None,
        measured_step_s=None,
        error=str(error),
    )
    writer.close()


def new_directory(spec: RunSpec, name: str = "") -> Path:
    """That of `spec`, or a new one below `runs/` after a job of this name."""
    if spec.out:
        directory = Path(spec.out)
    else:
        now = datetime.datetime.now().strftime("%Y%m%d-%H%M%S")
        directory = Path("runs") / f"{name}-{now}"
    directory = directory.resolve()
    if (directory / "events.jsonl").exists():
        raise RunError(
            f"{directory} already holds a run",
            next_step="give another --out, or remove it; a run is never overwritten",
        )
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunError(
            f"the run's directory {directory} cannot be made: {error.strerror}",
            next_step="give an --out below a directory that you may write to",
        ) from error
    return directory
