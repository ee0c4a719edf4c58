from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from paceline.report.analysis import (
    PARTS,
    Spread,
    break_down,
    compare,
    mean_shares,
    rank_times,
    samples_per_s,
)
from paceline.report.curves import smooth, thin
from paceline.report.reader import RunLog, read_log
from paceline.report.sentences import result, why_not_more

Event = dict[str, Any]


def _layout(workers: int, threads: int) -> dict[str, int]:
    return {"dp_replicate": workers, "threads": threads}


def _trial(workers: int, threads: int, step_s: list[float], *parts: float, error: str | None = None) -> Event:
    names = ("compute_s", "communication_s", "data_s", "optimizer_s")
    return {
        "event": "trial", "time_s": 1.0, "layout": _layout(workers, threads),
        "label": f"{workers} × {threads}", "workers": workers, "threads": threads, "step_s": step_s,
        "error": error,
        **dict(zip(names, parts or (None,) * 4, strict=True)),
    }  # fmt: skip


def _plan(workers: int, threads: int, chosen_by: str = "trial") -> Event:
    return {
        "event": "plan", "time_s": 1.0, "layout": _layout(workers, threads),
        "label": f"{workers} × {threads}", "chosen_by": chosen_by,
    }  # fmt: skip


def _run(device: str = "cpu", cores: int = 2, workers: int = 2) -> Event:
    host = {"name": "h", "device": device, "cores": cores, "workers": workers}
    return {
        "event": "run", "time_s": 0.0, "schema": 1, "name": "job", "batch_size": 60,
        "cluster": {"hosts": [host]},
    }  # fmt: skip


def _step(optimizer_s: float) -> Event:
    return {
        "event": "step", "time_s": 2.0, "step": 1, "loss": 1.0, "samples": 60, "step_s": 0.6,
        "compute_s": 0.5, "communication_s": 0.04, "data_s": 0.01, "optimizer_s": optimizer_s,
        "elapsed_s": 0.6,
    }  # fmt: skip


@pytest.fixture
def log_of(write_run: Callable[..., Path]) -> Callable[..., RunLog]:
    return lambda *events: read_log(write_run(list(events)))


UNIT = _trial(1, 1, [1.0, 1.2, 1.0], 0.9, 0.0, 0.02, 0.01)
PAIR = _trial(2, 1, [0.6, 0.6, 0.75], 0.5, 0.04, 0.01, 0.01)


def test_speeds_by_hand(log_of: Callable[..., RunLog]) -> None:
    comparison = compare(log_of(_run(), UNIT, PAIR, _plan(2, 1)))
    pair = comparison.chosen
    assert pair is not None
    assert pair.speedup is not None
    assert comparison.unit is comparison.measured[0]
    assert pair.step_s == Spread(0.6, 0.6, 0.75)
    assert pair.samples_per_s == Spread(60 / 0.6, 60 / 0.75, 60 / 0.6)
    assert pair.speedup.median == pytest.approx(1.0 / 0.6)
    assert (pair.speedup.low, pair.speedup.high) == pytest.approx((1.0 / 0.75, 1.2 / 0.6))
    assert pair.efficiency == pytest.approx(1.0 / 0.6 / 2)
    assert comparison.ideal_samples_per_s == pytest.approx(120)


def test_losses_by_hand_add_up_to_what_is_missing(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), UNIT, PAIR, _plan(2, 1), _step(optimizer_s=0.01))
    comparison = compare(log)
    assert comparison.chosen is not None
    breakdown = break_down(log, comparison, comparison.chosen)
    assert breakdown is not None
    extra_s = {loss.part: loss.extra_s for loss in breakdown.losses}
    # even shares of one worker's second: 0.45 computation, 0.01 data, 0.005 optimizer, 0.035 the rest
    expected = {"computation": 0.05, "communication": 0.04, "data": 0.0, "optimizer": 0.005, "other": 0.005}
    assert extra_s == pytest.approx(expected, abs=1e-12)
    assert breakdown.ideal_s + sum(extra_s.values()) == pytest.approx(0.6)
    assert breakdown.missing == pytest.approx(2 - 1 / 0.6)
    computation = breakdown.losses[0]
    assert computation.slower == pytest.approx(0.5 / 0.45 - 1)
    assert computation.missing == pytest.approx(2 * 0.05 / 0.6)


def test_the_words_give_the_numbers(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), UNIT, PAIR, _plan(2, 1), _step(optimizer_s=0.01))
    assert result(log) == "2 × 1 train 1.67× as fast as 1 × 1; 2× would be ideal on 2 cores."
    told = why_not_more(log)
    assert told.startswith(
        "The missing 0.33: computation takes 11 % longer than an even share of one worker's"
    )
    assert "communication takes 7 % of a step, the wait for other workers included (0.13)" in told
    assert "the optimizer's update takes 2 %: more than its even share (0.02)" in told


def test_computation_of_more_than_twice_its_share_is_a_factor(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), UNIT, _trial(2, 1, [1.2] * 3, 1.08, 0.04, 0.01, 0.01), _plan(2, 1))
    assert "computation takes 2.40× an even share of one worker's" in why_not_more(log)


def test_more_than_ideal_is_not_explained_away(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), UNIT, _trial(2, 1, [0.4] * 3, 0.36, 0.01, 0.01, 0.01), _plan(2, 1))
    assert why_not_more(log).startswith("That is 0.50× more than ideal")


def test_one_worker_that_wins_is_said_and_why_the_next_lost(log_of: Callable[..., RunLog]) -> None:
    slow = _trial(2, 1, [1.25] * 3, 0.5, 0.7, 0.01, 0.01)
    log = log_of(_run(), UNIT, slow, _plan(1, 1))
    assert result(log) == "1 × 1 is the fastest of 2 layouts timed: 2 × 1, the next, trains 0.80× as fast."
    assert why_not_more(log).startswith(
        "2 × 1 reaches 0.80× of 2×. The missing 1.20: communication takes 56 % of a step"
    )


def test_a_given_layout_has_no_speed_up_and_says_so(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), _plan(2, 1, "user"))
    comparison = compare(log)
    assert (comparison.measured, comparison.unit, comparison.chosen) == ((), None, None)
    assert "as asked for. No other layout was timed" in result(log)
    assert why_not_more(log) == ""


def test_a_unit_that_could_not_be_timed_is_said(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), _trial(1, 1, [], error="out of memory"), PAIR, _plan(2, 1))
    comparison = compare(log)
    assert comparison.measured[0].speedup is None
    assert comparison.measured[0].efficiency is None
    assert [trial.error for trial in comparison.failed] == ["out of memory"]
    assert "One worker with one thread was not timed" in result(log)
    assert why_not_more(log) == ""


def test_parts_that_were_not_timed_are_not_made_up(log_of: Callable[..., RunLog]) -> None:
    log = log_of(_run(), UNIT, _trial(2, 1, [0.6] * 3), _plan(2, 1))
    assert (
        why_not_more(log) == "Why 0.33 is missing is not known: the trials did not time the parts of a step."
    )


def test_no_plan_yet(log_of: Callable[..., RunLog]) -> None:
    assert result(log_of(_run(), UNIT)) == "No layout has been chosen yet."


def test_on_devices_other_than_cpus_a_processor_is_a_device(log_of: Callable[..., RunLog]) -> None:
    trials = (_trial(1, 8, [1.0] * 3, 0.9, 0.0, 0.02, 0.01), _trial(4, 8, [0.3] * 3, 0.25, 0.02, 0.0, 0.01))
    comparison = compare(log_of(_run("cuda", cores=32, workers=4), *trials, _plan(4, 8)))
    assert comparison.unit is not None
    assert comparison.chosen is not None
    assert (comparison.processors, comparison.chosen.processors) == (4, 4)


def test_more_threads_than_cores_do_not_raise_the_ideal(log_of: Callable[..., RunLog]) -> None:
    comparison = compare(log_of(_run(), UNIT, _trial(2, 2, [0.7] * 3), _plan(2, 2)))
    assert comparison.chosen is not None
    assert comparison.chosen.processors == 2


def test_time_per_rank_adds_up(write_run: Callable[..., Path]) -> None:
    log = read_log(write_run("finished"))
    assert log.end is not None
    times = rank_times(log)
    assert [time.rank for time in times] == [0, 1]
    assert times[0].step_s == pytest.approx(log.end.train_s / 800)
    assert [times[0].share(part) for part in PARTS] == pytest.approx([0.845, 0.09, 0.01, 0.04, 0.015])
    shares = mean_shares(times)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["computation"] == pytest.approx(0.86)


def test_a_run_that_died_has_the_time_of_rank_0(write_run: Callable[..., Path]) -> None:
    log = read_log(write_run("failed"))
    (time,) = rank_times(log)
    assert (time.rank, time.steps) == (0, 90)
    assert time.share("communication") == pytest.approx(0.09)


def test_speed_so_far(write_run: Callable[..., Path], run_events: Callable[..., Any]) -> None:
    events = [event for event in run_events("failed") if event["event"] != "end"]
    log = read_log(write_run(events))
    assert samples_per_s(log) == pytest.approx(90 * 64 / log.steps[-1].elapsed_s)
    assert samples_per_s(read_log(write_run(events[:5]))) is None


def test_smoothing_keeps_gaps_and_means() -> None:
    values = np.array([1.0, 3.0, 5.0, np.nan, 9.0, 11.0])
    smoothed = smooth(values, 3)
    assert smoothed[[0, 1]] == pytest.approx([2.0, 3.0])
    assert math.isnan(smoothed[3])
    assert smoothed[[2, 4, 5]] == pytest.approx([4.0, 10.0, 10.0])


def test_thinning_keeps_ends_and_spikes() -> None:
    y = np.zeros(100_000)
    y[51_234], y[7] = 9.0, np.nan
    x, kept = thin(np.arange(100_000.0), y)
    assert len(x) <= 1000
    assert (x[0], x[-1]) == (0, 99_999)
    assert 51_234 in x
    assert np.nanmax(kept) == 9.0
    assert (np.diff(x) > 0).all()
