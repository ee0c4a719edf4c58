"""Whether a run that has parted from its forecast should change its layout, in view of what was timed just now."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from statistics import median

from paceline.plan.choose import choose, compare
from paceline.records import Layout, Plan, Trial

LEAST_GAIN = 0.1
"""Share of a step's time that a change must save."""
REST_STEPS = 200
"""After a decision nothing is reconsidered for so many steps, ..."""
REST_TRIALS = 10.0
"""... nor for so many times what the trial took."""


@dataclasses.dataclass(frozen=True)
class Decision:
    """To stay, or to take another layout."""

    plan: Plan | None
    """Of the other layout; None: stay."""
    reason: str
    """Why it stays, as the end of `it stays, as …`; empty where it does not."""
    step_s: float | None
    """What the trial measured for the layout that is trained with from now on."""


def decide(trials: Sequence[Trial], current: Layout, *, steps_left: int | None, change_s: float) -> Decision:
    """Take the fastest, if it saves more than `LEAST_GAIN`, more than noise, and more than the change costs.

    Args:
        trials: `current` among them.
        steps_left: None where that is not known: then nothing is held against the cost.
        change_s: what the change costs.
    """
    own = next(trial for trial in trials if trial.layout == current)
    if not own.step_s:
        return Decision(None, f"{own.label} could not be timed: {own.error}", None)
    own_s = median(own.step_s)
    plan = choose(trials)
    if plan.layout == current:
        return Decision(None, f"nothing that was timed is faster ({_ms(own_s)} now)", own_s)
    best = next(trial for trial in trials if trial.layout == plan.layout)
    best_s = median(best.step_s)
    ratio, noise = compare(best, own)
    told = f"{best.label} would take {_ms(best_s)} instead of {_ms(own_s)}"
    if 1 - ratio <= LEAST_GAIN:
        return Decision(None, f"{told}: a change must save more than {LEAST_GAIN:.0%}", own_s)
    if 1 - ratio <= noise:
        return Decision(None, f"{told}, which is within the noise of the trial ({noise:.0%})", own_s)
    if steps_left is not None and (saved_s := steps_left * (own_s - best_s)) <= change_s:
        saving = f"over the {steps_left} steps left that saves {saved_s:.3g} s"
        return Decision(None, f"{told}: {saving}, and changing takes about {change_s:.3g} s", own_s)
    return Decision(plan, "", best_s)


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3g} ms"
