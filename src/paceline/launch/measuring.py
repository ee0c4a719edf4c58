"""Measuring by all workers of a launch together: hosts alone, or a job, of which what they found is kept for later."""

from __future__ import annotations

import json

from pydantic import ValidationError

from paceline.comm.group import Group
from paceline.comm.threads import take_cores, user_threads
from paceline.comm.world import World, gather_cluster
from paceline.launch.agreeing import agree_on_images, agree_on_matmul, agree_on_precision
from paceline.launch.spec import KEPT_FILE, MEASURED_FILES, RunSpec
from paceline.load import LoadedJob
from paceline.measure import store
from paceline.measure.machine import versions
from paceline.plan.cutting import REVISION
from paceline.plan.hardware import HARDWARE_FILE
from paceline.plan.profile import MOST_SPREAD, LinkedCluster, Profile
from paceline.records import Cluster, Record
from paceline.train.allocator import keep_freed_memory
from paceline.train.planning import BUDGET_S as JOB_BUDGET_S
from paceline.train.planning import measure_all
from paceline.train.session import Datasets
from paceline.train.survey import BUDGET_S, survey

Known = tuple[Profile, LinkedCluster]


class Measuring:
    """Measuring a job; and the cache of what was found, on rank 0."""

    def __init__(
        self,
        spec: RunSpec,
        loaded: LoadedJob,
        world: World,
        everyone: Group,
        cluster: Cluster,
        datasets: Datasets,
        precision: str,
    ) -> None:
        self._spec, self._loaded, self._world, self._everyone = spec, loaded, world, everyone
        self._cluster, self._datasets, self._precision = cluster, datasets, precision
        self._key = self._make_key() if world.rank == 0 else ""

    def kept(self) -> Known | None:
        """What an earlier run has kept; None where that is nothing, or another version's, and on other ranks."""
        values = store.kept(self._key) if self._key else None
        if values is None:
            return None
        try:
            profile, linked = values
            return Profile.from_json(profile), LinkedCluster.from_json(linked)
        except (ValidationError, ValueError, TypeError):
            return None

    def measure(self) -> Known | None:
        """On rank 0 what all workers find. A collective call.

        It is kept, unless the machine was too busy, or a plan was given a budget: what is measured in a hurry, for a
        look at it, is nothing to train by.

        Raises:
            PacelineError: the job fails on its first steps.
        """
        measured = measure_all(
            self._loaded.job,
            self._datasets,
            self._world,
            self._everyone,
            self._cluster,
            seed=self._spec.seed,
            precision=self._precision,
            threads=user_threads(),
            budget_s=self._spec.budget_s or JOB_BUDGET_S,
        )
        in_a_hurry = self._spec.purpose == "plan" and self._spec.budget_s is not None
        if measured is not None and measured[0].spread <= MOST_SPREAD and not in_a_hurry:
            store.keep(self._key, [record.to_json() for record in measured])
        return measured

    def _make_key(self) -> str:
        """Under which what is measured is kept."""
        loaded = self._loaded
        about = (
            self._cluster.to_json(),
            versions(),
            self._precision,
            loaded.job.batch_size,
            user_threads(),
            self._everyone.transport,
            self._datasets.matmul.library,
            # Fields that came since are missing in what was kept before.
            [record.model_json_schema() for record in (Profile, LinkedCluster)],
            REVISION,
        )
        return store.key_of(loaded.path, loaded.options, *about)


def measure_job(spec: RunSpec, loaded: LoadedJob, world: World) -> None:
    """Leave what the planner has to know of a job in the run's directory; it is kept for later runs, too.

    For a plan what an earlier one has kept is taken, unless it is to be measured again; `KEPT_FILE` says so.
    """
    everyone = world.group(world.size)
    assert everyone is not None
    take_cores(world.local_rank, world.local_size)
    keep_freed_memory()
    cluster = gather_cluster(everyone, world)
    datasets = Datasets(loaded.job, spec.seed)
    agree_on_matmul(spec, loaded, datasets, world, everyone, cluster)
    precision, _ = agree_on_precision(spec, loaded, datasets, world, everyone, cluster)
    agree_on_images(spec, loaded, datasets, world, everyone, cluster, precision)
    measuring = Measuring(spec, loaded, world, everyone, cluster, datasets, precision)
    takes_kept = spec.purpose == "plan" and not spec.remeasure and spec.budget_s is None
    known = measuring.kept() if takes_kept else None
    if everyone.gather_json(known is not None, "what is known of the job")[0]:
        if known is not None:
            (spec.directory / KEPT_FILE).touch()
    else:
        known = measuring.measure()
    for name, record in zip(MEASURED_FILES, known or (), strict=known is not None):
        _write(spec, name, record)


def measure_hosts(spec: RunSpec, world: World) -> None:
    """Leave what there is to know of the hosts in the run's directory."""
    everyone = world.group(world.size)
    assert everyone is not None
    keep_freed_memory()
    found = survey(world, everyone, gather_cluster(everyone, world), spec.budget_s or BUDGET_S)
    if found is not None:
        _write(spec, HARDWARE_FILE, found)


def _write(spec: RunSpec, name: str, record: Record) -> None:
    (spec.directory / name).write_text(json.dumps(record.to_json(), indent=2) + "\n")
