"""`--layout auto`: measure a job, or take what is known of it; forecast; time what may be fastest; take the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from pydantic import ValidationError

from paceline.comm.group import Group
from paceline.comm.threads import threads_for, user_threads
from paceline.comm.world import World
from paceline.launch.spec import RunSpec
from paceline.load import LoadedJob
from paceline.measure import store
from paceline.measure.machine import versions
from paceline.plan.candidates import candidates
from paceline.plan.choose import JobForecasts, choose
from paceline.plan.profile import MOST_SPREAD, LinkedCluster, Profile
from paceline.plan.shortlist import shortlist
from paceline.records import Cluster, Layout, Plan, Trial, describe_layout
from paceline.train.planning import measure_all
from paceline.train.session import Datasets
from paceline.train.trial import LayoutTimer

_TRIAL_S = 6.0
"""What timing the layouts of a shortlist may take, once each has run its first steps."""
_TOLD = 10
"""Forecasts that a run's events tell."""

Known = tuple[Profile, LinkedCluster]


class Choosing:
    """The choice of a layout by all workers of a launch together; rank 0 decides."""

    def __init__(
        self,
        spec: RunSpec,
        loaded: LoadedJob,
        world: World,
        everyone: Group,
        cluster: Cluster,
        datasets: Datasets,
        precision: str,
        write: Callable[..., None],
    ) -> None:
        """
        Args:
            write: an event, on rank 0.
        """
        self._spec, self._loaded, self._world, self._everyone = spec, loaded, world, everyone
        self._cluster, self._datasets, self._precision, self._write = cluster, datasets, precision, write
        self._always = candidates(cluster, loaded.job.batch_size, threads=user_threads())
        self._planned: JobForecasts | None = None

    @property
    def has_choice(self) -> bool:
        """Whether more than one layout is possible at all."""
        return len(self._always) > 1

    def run(self) -> Plan:
        """The plan, the same on all workers. Single processes and plain data parallelism are always timed.

        Raises:
            LayoutError: nothing fits, or nothing could be timed.
            PacelineError: the job fails on its first steps.
        """
        everyone = self._everyone
        if not self.has_choice:
            (only,) = self._always
            return Plan(
                layout=only,
                label=describe_layout(only, threads_for(1, only.threads), self._cluster.device),
                reason="it is the only layout that this machine and batch size allow",
                chosen_by="trial",
            )
        self._planned = planned = self._forecast()
        trials = self.time(self.shortlist() if planned is not None else [])
        for trial in trials:
            self._write("trial", **trial.to_json())
        decided = None
        if planned is not None:
            plan = choose(trials)
            forecast = planned.of(plan.layout)
            update = {"planned_step_s": forecast.step_s, "planned_error_s": forecast.error_s}
            decided = plan.model_copy(update=update).to_json()
        return Plan.from_json(everyone.gather_json(decided, "the plan")[0])

    def shortlist(self, current: Layout | None = None) -> list[Layout]:
        """On rank 0: what is worth timing, in view of the forecasts; `current` among them."""
        assert self._planned is not None
        always = self._always if current is None or current in self._always else [current, *self._always]
        return shortlist(self._planned.found.fastest, always)

    def time(self, layouts: Sequence[Layout]) -> list[Trial]:
        """Time the layouts that rank 0 gives; the same on all workers. A collective call."""
        told = [str(layout) for layout in layouts]
        texts = self._everyone.gather_json(told, "layouts to time")[0]
        timer = LayoutTimer(
            self._loaded.job,
            [Layout.parse(text) for text in texts],
            self._world,
            self._datasets,
            seed=self._spec.seed,
            precision=self._precision,
            budget_s=_TRIAL_S,
        )
        return timer.run()

    def _forecast(self) -> JobForecasts | None:
        """On rank 0 the forecasts of this job's layouts."""
        begin_s = time.time()
        key = self._key() if self._world.rank == 0 else ""
        known = None if not key or self._spec.remeasure else _kept(key)
        is_kept: bool = self._everyone.gather_json(known is not None, "what is known of the job")[0]
        if not is_kept:
            known = self._measure(key)
        if known is None:
            return None
        profile = known[0].model_copy(update={"past_error": store.past_error()})
        planned = JobForecasts(profile, known[1])
        self._write(
            "forecasts",
            source="kept" if is_kept else "measured",
            measuring_s=time.time() - begin_s,
            possible=planned.found.num_possible,
            forecasts=[forecast.to_json() for forecast in planned.found.fastest[:_TOLD]],
        )
        return planned

    def _key(self) -> str:
        """Under which what is measured is kept."""
        loaded = self._loaded
        about = (
            self._cluster.to_json(),
            versions(),
            self._precision,
            loaded.job.batch_size,
            user_threads(),
            self._everyone.transport,
        )
        return store.key_of(loaded.path, loaded.options, *about)

    def _measure(self, key: str) -> Known | None:
        """All workers measure; on rank 0 what they found, which is kept."""
        measured = measure_all(
            self._loaded.job,
            self._datasets,
            self._world,
            self._everyone,
            self._cluster,
            seed=self._spec.seed,
            precision=self._precision,
            threads=user_threads(),
        )
        if measured is None:
            return None
        profile, _ = measured
        if profile.spread <= MOST_SPREAD:
            store.keep(key, [record.to_json() for record in measured])
        else:
            self._write("message", level="warning", text=profile.how_noisy)
        return measured


def _kept(key: str) -> Known | None:
    """What an earlier run has kept; None where that is nothing, or another version's."""
    values = store.kept(key)
    if values is None:
        return None
    try:
        profile, linked = values
        return Profile.from_json(profile), LinkedCluster.from_json(linked)
    except (ValidationError, ValueError, TypeError):
        return None
