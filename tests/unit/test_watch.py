"""Saying that a run has parted from its forecast, and where."""

from __future__ import annotations

from paceline.train.step import StepResult
from paceline.train.watch import _WINDOW, Watch


def step(compute_s: float, communication_s: float = 0.001) -> StepResult:
    step_s = compute_s + communication_s
    return StepResult(1.0, 8, [0.1], None, False, step_s, compute_s, communication_s, 0.0, 0.0)


def told(watch: Watch, result: StepResult, windows: int) -> list[str]:
    return [text for _ in range(windows * _WINDOW) if (text := watch.on_step(result))]


def test_it_is_silent_while_steps_are_as_forecast_or_once_longer():
    watch = Watch(0.010, 0.002)
    assert told(watch, step(0.010), 3) == []
    assert told(watch, step(0.020), 1) == []
    assert told(watch, step(0.011), 3) == []


def test_it_says_once_what_takes_longer_and_when_it_is_over():
    watch = Watch(0.010, 0.002)
    told(watch, step(0.009), 2)
    (text,) = told(watch, step(0.009, 0.011), 5)
    assert text.startswith("Steps take 20 ms, 2.00 times the forecast of 10 ± 2 ms: communication")
    assert "takes 10 ms more than in the run's first steps; a link may have got slower" in text
    assert told(watch, step(0.009), 3) == ["Steps take 10 ms again, as was forecast."]
    assert len(told(watch, step(0.03), 3)) == 1


def test_without_a_forecast_and_within_its_error_nothing_is_told():
    assert told(Watch(None, 0.0), step(1.0), 5) == []
    assert told(Watch(0.010, 0.020), step(0.025), 5) == []
    # A forecast that claims to be exact is given the machine's own noise.
    assert told(Watch(0.010, 0.0), step(0.0104), 5) == []


def test_what_lies_between_the_forecast_and_the_trial_is_as_expected():
    for step_s in (0.009, 0.012, 0.015):
        assert told(Watch(0.010, 0.001, trial_s=0.014), step(step_s - 0.001), 5) == []
    (text,) = told(Watch(0.010, 0.001, trial_s=0.014), step(0.019), 5)
    assert text.startswith("Steps take 20 ms, 2.00 times the forecast of 10")
