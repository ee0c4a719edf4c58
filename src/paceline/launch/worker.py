"""What one worker does, from joining the others to the end of the run.

The launcher starts it as `python -m paceline.launch.worker RUN.json`; under torchrun every process of
`-m paceline train FILE` becomes one.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

from paceline.comm.beacon import Beacon
from paceline.comm.mesh import Mesh, make_mesh
from paceline.comm.threads import take_cores, threads_for
from paceline.comm.world import World, gather_cluster, join
from paceline.errors import LayoutError, PacelineError
from paceline.events import SCHEMA, EventWriter
from paceline.job import Job
from paceline.launch.agreeing import agree_on_images, agree_on_matmul, agree_on_precision
from paceline.launch.choosing import Choosing
from paceline.launch.failure import record
from paceline.launch.measuring import measure_hosts, measure_job
from paceline.launch.proving import Proving
from paceline.launch.replanning import Replanning
from paceline.launch.spec import AUTO, RunSpec
from paceline.load import LoadedJob, load_job_file
from paceline.measure import store
from paceline.measure.machine import device_kind, peak_memory_bytes, versions
from paceline.plan.choose import without_workers
from paceline.records import Cluster, Layout, Plan, describe_layout
from paceline.split.finding import Found
from paceline.train.allocator import keep_freed_memory
from paceline.train.compiler import put_off_compiler
from paceline.train.data import num_batches, num_samples
from paceline.train.loop import TrainingLoop, save, showcase
from paceline.train.proof import require
from paceline.train.session import Datasets, Session
from paceline.train.target import Length, Target
from paceline.train.watch import Watch

_PR_SET_PDEATHSIG = 1


class Worker:
    """One worker of a run. `run` is called on every worker of the launch."""

    def __init__(self, spec: RunSpec) -> None:
        self._spec = spec
        self._begin_s = time.time()
        self._writer: EventWriter | None = None
        self._loop: TrainingLoop | None = None
        self._stop_requested = False

    def run(self) -> None:
        """Take part in the run.

        Raises:
            PacelineError: what failed, after it was recorded in the run's directory.
        """
        rank = int(os.environ.get("RANK", 0))
        try:
            self._run()
        except Exception as error:
            raise record(self._spec.directory, rank, error) from error

    def _run(self) -> None:
        spec = self._spec
        put_off_compiler()
        loaded = load_job_file(spec.job_file, spec.settings) if spec.job_file else None
        world = join(device_kind(), spec.timeout_s, spec.store_port, spec.transport)
        try:
            self._stop_on_signal()
            if world.rank == 0:
                self._writer = EventWriter(spec.directory / "events.jsonl")
            if loaded is None:
                measure_hosts(spec, world)
            elif spec.purpose == "verify":
                self._verify(loaded, world)
            elif spec.purpose in ("plan", "measure"):
                measure_job(spec, loaded, world)
            else:
                self._train(loaded, world)
        finally:
            world.leave()

    def _verify(self, loaded: LoadedJob, world: World) -> None:
        layout = Layout.parse(self._spec.layout)
        self._check_enough(layout, world)
        mesh = make_mesh(world, layout)
        if mesh is not None:
            self._proving(loaded.job, world, Datasets(loaded.job, self._spec.seed)).prove(mesh)

    def _proving(self, job: Job, world: World, datasets: Datasets) -> Proving:
        return Proving(job, world, datasets, self._spec.seed, self._write)

    def _train(self, loaded: LoadedJob, world: World) -> None:
        spec, job = self._spec, loaded.job
        everyone = world.group(world.size)
        assert everyone is not None
        take_cores(world.local_rank, world.local_size)
        keep_freed_memory()
        cluster = gather_cluster(everyone, world)
        datasets = Datasets(job, spec.seed)
        agree_on_matmul(spec, loaded, datasets, world, everyone, cluster)
        precision, precision_reason = agree_on_precision(spec, loaded, datasets, world, everyone, cluster)
        agree_on_images(spec, loaded, datasets, world, everyone, cluster, precision)
        length = self._length(loaded, datasets)
        target = Target.parse(spec.until, job) if spec.until is not None else None
        self._write(
            "run",
            schema=SCHEMA,
            name=loaded.name,
            job_file=str(loaded.path),
            seed=spec.seed,
            batch_size=job.batch_size,
            options=loaded.options,
            total_steps=length.steps,
            epochs=length.epochs,
            until=None if target is None else {"metric": target.metric, "value": target.value},
            train_samples=num_samples(datasets["train"], "train"),
            test_samples=num_samples(datasets["test"], "test"),
            tokens_per_sample=job.tokens_per_sample,
            precision=precision,
            precision_reason=precision_reason,
            matmul=datasets.matmul.library,
            cluster=cluster.to_json(),
            versions=versions(),
            command=spec.command,
        )
        beacon = Beacon(world) if spec.replan else None
        choosing = Choosing(spec, loaded, world, everyone, cluster, datasets, precision, self._write)
        plan = self._plan(job, world, cluster, choosing)
        mesh = self._take(plan, world)
        found: Found | None = None
        proving = self._proving(job, world, datasets) if spec.verify else None
        if mesh is not None and proving is not None:
            proof, found = proving.prove_if_possible(mesh)
            has_single = any(t.workers == 1 and t.step_s for t in plan.trials)
            if proof is not None and proof.status == "different" and has_single:
                plan = without_workers(plan, f"{plan.label} would train something else: {proof.what_differs}")
                mesh, found = self._take(plan, world), None
            elif proof is not None:
                require(proof)
        if mesh is None and beacon is None:
            return

        def begin(mesh: Mesh, found: Found | None) -> Session:
            session = Session(
                job,
                mesh.layout,
                seed=spec.seed,
                total_steps=length.steps,
                precision=precision,
                world=world,
                mesh=mesh,
                datasets=datasets,
                found=found,
            )
            self._tell(session)
            return session

        watch = Watch(
            plan.planned_step_s or plan.forecast_step_s,
            plan.planned_error_s or 0.0,
            trial_s=plan.forecast_step_s,
        )
        session = None if mesh is None else begin(mesh, found)
        self._loop = loop = TrainingLoop(
            session, length, target, self._writer, watch, may_change=spec.replan and choosing.has_choice
        )
        if self._stop_requested:
            loop.request_stop()
        if session is not None:
            self._write("model", parameters=session.num_parameters)
        session = None  # the loop has it, and may give it up for another
        if beacon is not None:
            replanning = Replanning(choosing, world, everyone, beacon, proving, begin, self._write)
            plan = replanning.run(plan, loop)
        else:
            loop.run()
        if loop.session is not None:
            self._finish(loop.session, world, loop, plan)

    def _tell(self, session: Session) -> None:
        """What the user should know of how a session trains."""
        for piece, why in session.left_whole.items():
            text = f"{piece} is not divided by tp, as it would not compute the same on parts ({why})."
            self._write("message", level="warning", text=text)
        if session.why_cut_so:
            self._write("message", level="warning", text=session.why_cut_so)
        if session.why_not_shared:
            text = f"Every worker keeps all parameters and updates them all: {session.why_not_shared}."
            self._write("message", level="info", text=text)
        if session.what_noise_lacks:
            text = f"Gradient noise scale: {session.what_noise_lacks}."
            self._write("message", level="info", text=text)

    def _take(self, plan: Plan, world: World) -> Mesh | None:
        """Tell the plan; its mesh, or None on a worker that it leaves out."""
        mesh = make_mesh(world, plan.layout)
        if not self._spec.replan:
            world.release_groups(but=plan.layout.workers)
        if mesh is None:
            return None
        group = mesh.everyone
        self._write("plan", **plan.to_event(), transport=group.transport)
        if group.why_no_memory:
            self._write(
                "message", level="info", text=f"The workers talk through gloo: {group.why_no_memory}."
            )
        return mesh

    def _length(self, loaded: LoadedJob, datasets: Datasets) -> Length:
        per_epoch = num_batches(datasets["train"], loaded.job.batch_size)
        return self._spec.length(loaded.job, per_epoch)

    def _plan(self, job: Job, world: World, cluster: Cluster, choosing: Choosing) -> Plan:
        spec = self._spec
        if spec.layout != AUTO:
            layout = Layout.parse(spec.layout)
            layout.check_batch(job.batch_size)
            self._check_enough(layout, world)
            if layout.pp > 1:
                choosing.cut_as_forecast()
            local = min(world.local_size, layout.workers)
            label = describe_layout(layout, threads_for(local, layout.threads), cluster.device)
            return Plan(layout=layout, label=label, reason="as asked for", chosen_by="user")
        return choosing.run()

    def _check_enough(self, layout: Layout, world: World) -> None:
        if layout.workers > world.size:
            raise LayoutError(
                f"layout {layout} needs {layout.workers} workers, and {world.size} were started",
                next_step=f"start {layout.workers} (torchrun --nproc-per-node), or use a smaller layout",
            )

    def _finish(self, session: Session, world: World, loop: TrainingLoop, plan: Plan) -> None:
        outcome, tally = loop.outcome, loop.tally
        weights = save(session, self._spec.directory)
        cores, threads = take_cores(world.local_rank, session.local_workers, session.layout.threads)
        own = {
            "rank": world.rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "cores": list(cores),
            "threads": threads,
            "device": str(world.device),
            "steps": tally.steps,
            "train_s": tally.train_s,
            **tally.sums_s,
            "peak_memory_bytes": peak_memory_bytes(world.device.type),
        }
        if text := session.datasets.matmul.describe():
            self._write("message", level="info", text=text)
        if session.channels_last is not None:
            text = (
                "Batches of images were laid out with their channels last: a forward and a backward pass "
                f"took {session.channels_last:.2f} of the time."
            )
            self._write("message", level="info", text=text)
        ranks = session.group.gather_json(own, "the workers' times")
        self._write("ranks", ranks=ranks)
        if self._writer is None:
            return
        if plan.planned_step_s is not None and tally.median_step_s is not None:
            about = {"job": session.job.name, "layout": str(plan.layout)}
            store.note_forecast(plan.planned_step_s, tally.median_step_s, **about)
        shown = outcome.status != "interrupted"
        numbers = showcase(session, self._writer, self._spec.directory) if shown else {}
        self._end(
            status=outcome.status,
            steps=outcome.steps,
            train_s=outcome.train_s,
            evaluation_s=outcome.evaluation_s,
            samples=outcome.samples,
            samples_per_s=outcome.samples / outcome.train_s if outcome.train_s else None,
            metrics={**outcome.metrics, **numbers},
            weights=weights,
            forecast_step_s=plan.forecast_step_s,
            planned_step_s=plan.planned_step_s,
            planned_error_s=plan.planned_error_s,
            measured_step_s=tally.median_step_s,
            error=None,
        )

    def _write(self, event: str, **fields: Any) -> None:
        if self._writer is not None:
            self._writer.write(event, **fields)

    def _end(self, **fields: Any) -> None:
        if self._writer is not None:
            self._writer.write("end", total_s=time.time() - self._begin_s, **fields)
            self._writer.close()

    def _stop_on_signal(self) -> None:
        """SIGTERM or SIGINT (Ctrl-C) ends the run at the next step, its weights saved."""

        def stop(number: int, frame: object) -> None:
            self._stop_requested = True
            if self._loop is not None:
                self._loop.request_stop()

        signal.signal(signal.SIGTERM, stop)
        signal.signal(signal.SIGINT, stop)


def _end_with_the_launcher() -> None:
    """Have Linux send SIGTERM when the launcher dies, even by SIGKILL: no worker trains on unseen."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def main() -> None:
    """Entry of a worker that the launcher started: the run's specification is the argument."""
    spec = RunSpec.from_json(json.loads(Path(sys.argv[1]).read_text()))
    _end_with_the_launcher()
    try:
        Worker(spec).run()
    except PacelineError as error:
        print(error, file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
