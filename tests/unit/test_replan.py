"""When a run that has parted from its forecast changes its layout, and how that is told."""

from __future__ import annotations

import pytest

from paceline.plan.replan import decide
from paceline.records import Layout, Trial
from paceline.report.kinds import ReplanEvent, decode
from paceline.report.sentences import how_replanned
from paceline.train.step import StepResult
from paceline.train.watch import _WINDOW, Watch

ONE, TWO = Layout(threads=1), Layout(dp_replicate=2, threads=1)


def trial(layout: Layout, *step_s: float) -> Trial:
    label = f"{layout.workers} × 1"
    return Trial(layout=layout, label=label, workers=layout.workers, threads=1, step_s=step_s)


def test_it_changes_where_that_pays():
    trials = [trial(ONE, 0.030, 0.031, 0.030), trial(TWO, 0.060, 0.061, 0.062)]
    decision = decide(trials, TWO, steps_left=1000, change_s=10.0)
    assert decision.plan is not None
    assert decision.plan.layout == ONE
    assert decision.step_s == 0.030
    assert decide(trials, TWO, steps_left=None, change_s=1e9).plan is not None


@pytest.mark.parametrize(
    ("one_s", "two_s", "steps_left", "why"),
    [
        ((0.030, 0.030, 0.030), (0.020, 0.020, 0.020), 1000, "nothing that was timed is faster"),
        ((0.028, 0.028, 0.028), (0.030, 0.030, 0.030), 1000, "must save more than 10%"),
        ((0.010, 0.025, 0.060), (0.030, 0.030, 0.030), 1000, "within the noise of the trial"),
        (
            (0.030, 0.030, 0.030),
            (0.060, 0.060, 0.060),
            100,
            "over the 100 steps left that saves 3 s, and changing",
        ),
    ],
)
def test_it_stays_and_says_why(one_s, two_s, steps_left, why):
    decision = decide([trial(ONE, *one_s), trial(TWO, *two_s)], TWO, steps_left=steps_left, change_s=10.0)
    assert decision.plan is None
    assert why in decision.reason
    assert decision.step_s == two_s[0]


def test_it_stays_where_the_present_layout_could_not_be_timed():
    failed = trial(TWO).model_copy(update={"error": "no room"})
    decision = decide([trial(ONE, 0.03), failed], TWO, steps_left=None, change_s=0.0)
    assert (decision.plan, decision.step_s) == (None, None)
    assert "2 × 1 could not be timed: no room" in decision.reason


def due_after(watch: Watch, step_s: float, most: int) -> int | None:
    """After how many steps of so long the layout is to be reconsidered."""
    result = StepResult(1.0, 8, [0.1], None, False, step_s, step_s, 0.0, 0.0, 0.0)
    for number in range(1, most + 1):
        watch.on_step(result)
        if watch.is_due:
            return number
    return None


def test_a_layout_is_reconsidered_after_two_windows_and_a_rest():
    assert due_after(Watch(0.010, 0.001), 0.010, 500) is None
    assert due_after(Watch(0.010, 0.001), 0.020, 500) == 2 * _WINDOW
    assert due_after(Watch(0.010, 0.001), 0.005, 500) == 2 * _WINDOW
    assert due_after(Watch(0.010, 0.001, rest_steps=200), 0.020, 500) == 200
    assert due_after(Watch(0.010, 0.001, rest_steps=50, rest_s=4.9), 0.020, 500) == 260
    assert due_after(Watch(None, 0.0), 0.020, 500) is None


def event(**changes: object) -> ReplanEvent:
    read = decode(
        {
            "event": "replan",
            "time_s": 1.0,
            "step": 420,
            "from": {"dp_replicate": 2},
            "from_label": "2 workers × 1 thread",
            "to": {"dp_replicate": 1},
            "to_label": "1 worker × 2 threads",
            "changed": True,
            "reason": "",
            "expected_s": 0.029,
            "measured_s": 0.061,
            "step_s": 0.031,
            "trials": [trial(ONE, 0.03).to_json()],
            "change_s": 4.2,
            **changes,
        }
    )
    assert isinstance(read, ReplanEvent)
    return read


def test_a_change_is_told_in_words():
    assert how_replanned(event()) == (
        "Step 420: 2 workers × 1 thread took 61 ms, 2.1 times the 29 ms expected: "
        "changed to 1 worker × 2 threads (31 ms); the change took 4.2 s."
    )
    assert how_replanned(event(changed=False, reason="nothing that was timed is faster")).endswith(
        "expected: it stays, as nothing that was timed is faster; finding out took 4.2 s."
    )
    assert event().trial_events()[0].step_s == (0.03,)
