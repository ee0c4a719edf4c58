"""Which layouts are timed, and which is taken."""

from __future__ import annotations

import math
from statistics import median

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.errors import LayoutError
from paceline.plan.candidates import candidates
from paceline.plan.choose import LEAST_GAIN, choose, compare, without_workers
from paceline.plan.shortlist import shortlist
from paceline.plan.terms import Forecast, Memory, Terms
from paceline.records import Cluster, Host, Layout, Trial


def cluster(cores: int, workers: int | None = None, device: str = "cpu", hosts: int = 1) -> Cluster:
    host = Host(
        name="h", device=device, device_name="x", cores=cores, memory_bytes=1, workers=workers or cores
    )
    return Cluster(hosts=(host,) * hosts)


def trial(workers: int, threads: int, *step_s: float, error: str | None = None, group: int = 0) -> Trial:
    return Trial(
        layout=Layout(dp_replicate=workers, threads=threads),
        label=f"{workers}×{threads}",
        workers=workers,
        threads=threads,
        step_s=step_s,
        error=error,
        group=group,
    )


def texts(found: list[Layout]) -> list[str]:
    return [str(layout) for layout in found]


def test_two_cores():
    assert texts(candidates(cluster(2), 32)) == [
        "dp_replicate=1,threads=1",
        "dp_replicate=1,threads=2",
        "dp_replicate=2,threads=1",
    ]


def test_eight_cores_share_them_out():
    assert texts(candidates(cluster(8), 32)) == [
        "dp_replicate=1,threads=1",
        "dp_replicate=1,threads=8",
        "dp_replicate=2,threads=4",
        "dp_replicate=4,threads=2",
        "dp_replicate=8,threads=1",
    ]


def test_numbers_of_workers_that_cannot_divide_the_batch_are_left_out():
    assert [layout.workers for layout in candidates(cluster(8), 6)] == [1, 1, 2]


def test_threads_that_the_user_set_hold_everywhere():
    assert texts(candidates(cluster(4), 8, threads=1)) == [
        "dp_replicate=1,threads=1",
        "dp_replicate=2,threads=1",
        "dp_replicate=4,threads=1",
    ]


def test_gpus_have_no_threads():
    assert texts(candidates(cluster(32, 4, "cuda"), 8)) == [
        "dp_replicate=1",
        "dp_replicate=2",
        "dp_replicate=4",
    ]


def test_two_hosts_of_one_worker():
    found = candidates(cluster(2, 1, hosts=2), 8)
    assert [(layout.workers, layout.threads) for layout in found] == [(1, 1), (1, 2), (2, 2)]


def test_the_fastest_is_taken_and_the_reason_says_how_much_faster():
    plan = choose([trial(1, 1, 1.0, 1.0), trial(1, 2, 0.8, 0.8), trial(2, 1, 0.5, 0.5)])
    assert plan.layout.workers == 2
    assert "1.60× as fast" in plan.reason
    assert plan.forecast_step_s == 0.5


def test_several_workers_that_gain_next_to_nothing_are_declined():
    plan = choose([trial(1, 1, 1.0, 1.0, 1.0), trial(2, 1, 0.99, 0.99, 0.99)])
    assert plan.layout.workers == 1
    assert "one process it is" in plan.reason


def test_a_single_process_that_wins_says_that_splitting_does_not_pay():
    plan = choose([trial(1, 2, 1.0), trial(2, 1, 3.0)])
    assert plan.layout.workers == 1
    assert "does not pay" in plan.reason


def test_a_machine_that_slows_down_half_way_is_fair_to_both():
    """Round by round two workers are 0.9 of one process, though a slow round spoils the medians."""
    plan = choose([trial(1, 1, 1.0, 1.0, 2.0, 2.0), trial(2, 1, 0.9, 0.9, 1.8, 1.8)])
    assert plan.layout.workers == 2


def test_of_layouts_that_a_trial_cannot_tell_apart_the_forecast_takes_one():
    one, other = trial(2, 1, 43.1, 46.8, 35.8, 40.8), trial(4, 1, 34.8, 53.1, 32.7, 46.0)
    single = trial(1, 1, 60.0, 60.0, 60.0, 60.0)
    assert choose([single, one, other]).layout == other.layout
    forecast_s = {single.layout: 60.0, one.layout: 28.0, other.layout: 32.0}
    assert choose([single, one, other], forecast_s).layout == one.layout
    # What is slower in every round, or by more than a twentieth, is not level.
    slower = trial(2, 1, 35.0, 54.0, 33.0, 47.0)
    assert choose([single, slower, other], forecast_s).layout == other.layout


def test_level_single_processes_are_said_to_be():
    one, other = trial(1, 1, 1.0, 1.02, 1.0), trial(1, 2, 1.01, 0.98, 0.99)
    plan = choose([one, other], {one.layout: 0.9, other.layout: 1.1})
    assert plan.layout == one.layout
    assert "are level in the trial" in plan.reason


def test_a_layout_that_failed_is_no_candidate():
    plan = choose([trial(1, 1, 1.0), trial(2, 1, error="out of memory")])
    assert plan.layout.workers == 1


def test_nothing_timed_is_an_error_with_the_reasons():
    with pytest.raises(LayoutError, match="2×1: out of memory"):
        choose([trial(2, 1, error="out of memory")])


times = st.lists(st.floats(0.01, 10), min_size=3, max_size=3)


@given(single=times, several=times)
def test_never_slower_than_one_process(single, several):
    """Invariant 3, on what was measured: the paired ratio of the choice to the single process."""
    plan = choose([trial(1, 1, *single), trial(2, 1, *several)])
    if plan.layout.workers == 2:
        ratio = median(b / a for a, b in zip(single, several, strict=True))
        assert ratio <= 1 - LEAST_GAIN + 1e-12


def test_a_plan_whose_layout_trains_something_else_falls_back_to_the_fastest_single_process():
    plan = choose([trial(1, 1, 3.0, 3.1, 3.2), trial(1, 2, 2.0, 2.1, 2.2), trial(2, 1, 1.0, 1.1, 1.2)])
    assert plan.layout.workers == 2
    instead = without_workers(plan, "2×1 would train something else")
    assert str(instead.layout) == "dp_replicate=1,threads=2"
    assert instead.reason == "1×2, as 2×1 would train something else."
    assert instead.forecast_step_s == 2.1
    assert instead.trials == plan.trials


def forecast(text: str, step_s: float, error_s: float = 0.1) -> Forecast:
    return Forecast(
        layout=Layout.parse(text), terms=Terms(compute_s=step_s), memory=Memory(), samples=8, error_s=error_s
    )


def test_a_shortlist_has_those_that_may_be_fastest_one_of_each_kind_and_what_is_always_timed():
    always = [Layout(threads=1), Layout(dp_replicate=2, threads=1)]
    fastest = [
        forecast("tp=2,threads=1", 1.0),
        forecast("dp_shard=2,zero=1,threads=1", 1.05),
        forecast("dp_shard=2,zero=2,threads=1", 1.06),
        forecast("dp_replicate=2,threads=1", 1.1),
        forecast("pp=2,micro=4,threads=1", 1.19),
        forecast("pp=2,micro=8,threads=1", 1.19),
        forecast("dp_shard=2,zero=3,threads=1", 1.25),
    ]
    wanted = ["tp=2,threads=1", "dp_shard=2,zero=1,threads=1", "pp=2,micro=4,threads=1"]
    assert texts(shortlist(fastest, always)) == [*texts(always), *wanted]
    assert texts(shortlist(fastest, always, most=1)) == [*texts(always), wanted[0]]
    narrow = [f.model_copy(update={"error_s": 0.01}) for f in fastest]
    assert texts(shortlist(narrow, always)) == [*texts(always), wanted[0]]
    assert shortlist([], always) == always


def test_layouts_that_were_not_timed_by_turns_are_compared_by_their_medians():
    """The machine was slow in the first's last rounds, when the second had not begun."""
    first, second = trial(1, 1, 1.0, 4.0, 4.0, 4.0, 1.0), trial(2, 1, 3.6, 0.9, 3.6, 3.6, 0.9)
    assert compare(second, first)[0] == pytest.approx(0.9)
    shaky = trial(2, 1, 0.8, 0.9, 1.0, group=1)
    ratio, noise = compare(shaky, trial(1, 1, 1.0, 1.2, 0.8))
    assert (ratio, noise) == (pytest.approx(0.9), pytest.approx(0.9 * math.hypot(0.1 / 0.9, 0.2)))
    # By turns one that is sometimes faster is level, and the forecast decides; apart it is not.
    one, two = trial(1, 1, 1.0, 1.0, 1.0), trial(1, 2, 1.02, 0.99, 1.03)
    forecast_s = {one.layout: 1.0, two.layout: 0.9}
    assert choose([one, two], forecast_s).layout == two.layout
    assert choose([one, two.model_copy(update={"group": 1})], forecast_s).layout == one.layout
