"""`--layout auto`: measure a job, or take what is known of it; forecast; time what may be fastest; take the fastest."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from paceline.comm.group import Group
from paceline.comm.threads import user_threads
from paceline.comm.world import World
from paceline.launch.measuring import Measuring
from paceline.launch.spec import RunSpec
from paceline.load import LoadedJob
from paceline.measure import store
from paceline.plan.candidates import candidates
from paceline.plan.choose import JobForecasts, choose
from paceline.plan.forecast import Forecaster
from paceline.plan.shortlist import shortlist
from paceline.records import Cluster, Layout, Plan, Trial
from paceline.train.session import Datasets
from paceline.train.trial import time_by_turns

_TRIAL_S = 6.0
"""What timing the layouts of a shortlist may take, once each has run its first steps."""
_TOLD = 10
"""Forecasts that a run's events tell."""


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
        self._measuring = Measuring(spec, loaded, world, everyone, cluster, datasets, precision)
        self._always = candidates(cluster, loaded.job.batch_size, threads=user_threads())
        self._planned: JobForecasts | None = None

    @property
    def has_choice(self) -> bool:
        """Whether there is another layout that a change of the machine could make the fastest."""
        return len(self._always) > 1

    def run(self) -> Plan:
        """The plan, the same on all workers. Single processes and plain data parallelism are always timed, if they fit.

        Raises:
            LayoutError: nothing fits, or nothing could be timed.
            PacelineError: the job fails on its first steps.
        """
        everyone = self._everyone
        self._planned = planned = self._forecast()
        trials = self.time(self.shortlist() if planned is not None else [])
        for trial in trials:
            self._write("trial", **trial.to_json())
        decided = None
        if planned is not None:
            plan = choose(trials, planned.steps_s(trials))
            forecast = planned.of(plan.layout)
            update = {"planned_step_s": forecast.step_s, "planned_error_s": forecast.error_s}
            decided = plan.model_copy(update=update).to_json()
        return Plan.from_json(everyone.gather_json(decided, "the plan")[0])

    def shortlist(self, current: Layout | None = None) -> list[Layout]:
        """On rank 0: what is worth timing, in view of the forecasts; `current` among them."""
        assert self._planned is not None
        always = [layout for layout in self._always if not self._planned.why_not(layout)]
        if current is not None and current not in always:
            always = [current, *always]
        return shortlist(self._planned.found.fastest, always)

    def time(self, layouts: Sequence[Layout]) -> list[Trial]:
        """Time the layouts that rank 0 gives; the same on all workers. A collective call."""
        return time_by_turns(
            self._planned.by_turns(layouts) if self._planned is not None else [],
            self._loaded.job,
            self._world,
            self._everyone,
            self._datasets,
            seed=self._spec.seed,
            precision=self._precision,
            budget_s=_TRIAL_S,
        )

    def cut_as_forecast(self) -> None:
        """Have pipelines cut as a forecast has them, if what it takes is kept: for a layout that the user asks for."""
        known = self._measuring.kept()
        if known is not None:
            self._world.known.cuts_of = Forecaster(*known).cuts_of

    def _forecast(self) -> JobForecasts | None:
        """On rank 0 the forecasts of this job's layouts."""
        begin_s = time.time()
        known = None if self._spec.remeasure else self._measuring.kept()
        is_kept: bool = self._everyone.gather_json(known is not None, "what is known of the job")[0]
        if not is_kept:
            known = self._measuring.measure()
            if known is not None and known[0].how_noisy:
                self._write("message", level="warning", text=known[0].how_noisy)
        if known is None:
            return None
        profile = known[0].model_copy(update={"past_error": store.past_error()})
        planned = JobForecasts(profile, known[1])
        self._world.known.cuts_of = planned.forecaster.cuts_of
        if profile.how_measured:
            self._write("message", level="info", text=profile.how_measured)
        reasons = list(filter(None, map(planned.why_not, self._always)))
        if reasons:
            text = f"Not timed, as there is no room for them: {'; '.join(reasons)}."
            self._write("message", level="info", text=text)
        self._write(
            "forecasts",
            source="kept" if is_kept else "measured",
            measuring_s=time.time() - begin_s,
            possible=planned.found.num_possible,
            forecasts=[forecast.to_json() for forecast in planned.found.fastest[:_TOLD]],
        )
        return planned
