"""`--replan`: a run that has parted from its forecast looks for a better layout, and goes on in that."""

from __future__ import annotations

import dataclasses
import gc
import math
import time
from collections.abc import Callable
from statistics import median
from typing import Any

from paceline.comm.beacon import Beacon
from paceline.comm.group import Group
from paceline.comm.mesh import Mesh, make_mesh
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.launch.choosing import Choosing
from paceline.launch.proving import Proving
from paceline.measure.machine import available_memory_bytes
from paceline.plan.replan import REST_STEPS, REST_TRIALS, Decision, decide
from paceline.records import Layout, Plan, Trial
from paceline.split.finding import Found
from paceline.train.allocator import give_back_freed_memory
from paceline.train.loop import Outcome, TrainingLoop
from paceline.train.session import Session
from paceline.train.watch import Watch

_END, _RECONSIDER = "end", "reconsider"


@dataclasses.dataclass
class _Change:
    """What came of one reconsideration, for its event."""

    step: int
    before: Plan
    expected_s: float | None
    measured_s: float | None
    begin_s: float = dataclasses.field(default_factory=time.perf_counter)
    trials: tuple[Trial, ...] = ()
    trial_s: float = 0.0
    move_s: float | None = None

    @property
    def passed_s(self) -> float:
        return time.perf_counter() - self.begin_s


class Replanning:
    """Trains a run to its end, in one layout after the other. Every worker of the launch calls `run`.

    Rank 0's watch asks for a reconsideration; that travels with a step's sums, so that all who train stop after the
    same step. Those whom the layout leaves out wait to be called (`Beacon`), and do nothing.
    """

    def __init__(
        self,
        choosing: Choosing,
        world: World,
        everyone: Group,
        beacon: Beacon,
        proving: Proving | None,
        begin: Callable[[Mesh, Found | None], Session],
        write: Callable[..., None],
    ) -> None:
        """
        Args:
            proving: None: layouts are taken without a proof.
            begin: a session in the layout of a mesh, split where it was found.
            write: an event, on rank 0.
        """
        self._choosing, self._world, self._everyone, self._beacon = choosing, world, everyone, beacon
        self._proving, self._begin, self._write = proving, begin, write
        self._move_s: float | None = None
        """What the last change took beside its trial."""

    def run(self, plan: Plan, loop: TrainingLoop) -> Plan:
        """Train to the end; the plan that was trained with at last. Then the loop's session is that plan's."""
        while not self._has_ended(loop):
            plan = self._reconsider(plan, loop)
        # Nobody leaves before all have been told.
        self._everyone.barrier("the end of the training")
        self._beacon.close()
        return plan

    def _has_ended(self, loop: TrainingLoop) -> bool:
        """Train, or wait, until the run has ended, or its layout is to be reconsidered."""
        if loop.session is None:
            return self._beacon.wait() == _END
        ended = loop.run()
        if self._world.rank == 0:
            self._beacon.call(_END if ended else _RECONSIDER)
        else:
            self._beacon.skip()
        return ended

    def _reconsider(self, plan: Plan, loop: TrainingLoop) -> Plan:
        """The plan to go on with: all workers together, between two steps."""
        told = plan.model_copy(update={"trials": ()}).to_json(), dataclasses.asdict(loop.outcome)
        plan_told, outcome = self._everyone.gather_json(told, "the state of the run")[0]
        plan, loop.outcome = Plan.from_json(plan_told), Outcome(**outcome)
        change = _Change(loop.outcome.steps, plan, loop.watch.expected_s, loop.watch.step_s)
        decision = self._why_impossible(change, loop.session) or self._decide(change, loop)
        found: Found | None = None
        mesh = None
        if decision.plan is not None:
            mesh = make_mesh(self._world, decision.plan.layout)
            why_not, found = self._prove(mesh)
            if why_not:
                decision = Decision(None, f"{decision.plan.label} {why_not}", self._own_s(change))
        if decision.plan is not None:
            begin_s = time.perf_counter()
            self._move(loop, mesh, found)
            self._move_s = change.move_s = time.perf_counter() - begin_s
            plan = decision.plan
        elif loop.session is not None:
            session = loop.session
            take_cores(self._world.local_rank, session.local_workers, session.layout.threads)
        rest_s = REST_TRIALS * change.trial_s if change.trials else math.inf
        loop.watch = Watch(decision.step_s, 0.0, rest_steps=REST_STEPS, rest_s=rest_s)
        self._tell(change, plan, decision, mesh)
        return plan

    def _why_impossible(self, change: _Change, session: Session | None) -> Decision | None:
        """To stay for good, where the training cannot be moved."""
        own = ["", False, 0]
        if session is not None:
            own = [session.why_not_movable(), session.needs_whole_parameters, session.state_bytes]
        own.append(available_memory_bytes(self._world.device.type))
        told = self._everyone.gather_json(own, "what would be moved")
        self._needs_whole = any(needs for _, needs, _, _ in told)
        layouts = self._layouts(change.before.layout) if self._world.rank == 0 else []
        # A trial holds a model, its gradients and an optimizer for each way of splitting, beside those of the training.
        needed = sum(state for _, _, state, _ in told) * (len(layouts) + 1)
        free = min(free for _, _, _, free in told)
        reason = next((reason for reason, _, _, _ in told if reason), "")
        if not reason and free and needed > free:
            reason = f"timing others would take {needed / 2**30:.1f} GiB of memory, and {free / 2**30:.1f} are free"
        reason = self._everyone.gather_json(reason, "whether it can be moved")[0]
        return Decision(None, reason, change.measured_s) if reason else None

    def _decide(self, change: _Change, loop: TrainingLoop) -> Decision:
        """Time what may be better; rank 0 decides."""
        layouts = self._layouts(change.before.layout) if self._world.rank == 0 else []
        change.trials = tuple(self._choosing.time(layouts))
        change.trial_s = change.passed_s
        told: Any = None
        if self._world.rank == 0:
            total = loop.length.steps
            # Before there was a first move it is taken to cost as much as the trial, which built all of them.
            change_s = change.trial_s + (change.trial_s if self._move_s is None else self._move_s)
            decision = decide(
                change.trials,
                change.before.layout,
                steps_left=None if total is None else total - change.step,
                change_s=change_s,
            )
            taken = None if decision.plan is None else decision.plan.to_json()
            told = taken, decision.reason, decision.step_s
        taken, reason, step_s = self._everyone.gather_json(told, "whether the layout changes")[0]
        return Decision(None if taken is None else Plan.from_json(taken), reason, step_s)

    def _layouts(self, current: Layout) -> list[Layout]:
        found = self._choosing.shortlist(current)
        if not self._needs_whole:
            return found
        return [layout for layout in found if layout == current or layout.tp * layout.dp_shard == 1]

    def _prove(self, mesh: Mesh | None) -> tuple[str, Found | None]:
        """Why the new layout is not to be taken, on all workers; and where the model is split in it."""
        why_not, found = "", None
        if mesh is not None and self._proving is not None:
            proof, found = self._proving.prove_if_possible(mesh)
            if proof is not None and proof.status == "different":
                why_not = f"would train something else: {proof.what_differs}"
        return self._everyone.gather_json(why_not, "whether the new layout is proven")[0], found

    def _move(self, loop: TrainingLoop, mesh: Mesh | None, found: Found | None) -> None:
        """Have the loop's training go on in the layout of `mesh`; None: without this worker."""
        state = None if loop.session is None else loop.session.collect_state()
        loop.change(None)
        gc.collect()  # models and their hooks refer to each other
        give_back_freed_memory()
        if mesh is not None:
            session = self._begin(mesh, found)
            session.load_state(state)
            loop.change(session)
            session.group.barrier("the change of the layout")

    def _own_s(self, change: _Change) -> float | None:
        own = next(trial for trial in change.trials if trial.layout == change.before.layout)
        return median(own.step_s) if own.step_s else None

    def _tell(self, change: _Change, plan: Plan, decision: Decision, mesh: Mesh | None) -> None:
        self._write(
            "replan",
            step=change.step,
            **{"from": change.before.layout.to_json(), "from_label": change.before.label},
            to=plan.layout.to_json(),
            to_label=plan.label,
            changed=decision.plan is not None,
            reason=decision.reason or plan.reason,
            expected_s=change.expected_s,
            measured_s=change.measured_s,
            step_s=decision.step_s,
            trials=[trial.to_json() for trial in change.trials],
            trial_s=change.trial_s,
            move_s=change.move_s,
            change_s=change.passed_s,
        )
        if decision.plan is not None and mesh is not None:
            self._write("plan", **plan.to_event(), transport=mesh.everyone.transport)
