"""Pipeline schedules: every order is executable, and what each one claims is what it does."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import LayoutError
from paceline.plan.schedules import SCHEDULES, Schedule, make_schedule
from paceline.plan.schedules.base import Action, find_fault
from paceline.plan.timeline import Timeline, simulate
from paceline.records import SCHEDULE_NAMES


def orders(schedule: Schedule) -> list[list[Action]]:
    return [schedule.actions(worker) for worker in range(schedule.pp)]


def fault(schedule: Schedule) -> str:
    return find_fault(orders(schedule), schedule.num_stages, schedule.num_micro, schedule.worker_of)


def with_equal_costs(name: str, pp: int, num_micro: int, stages: int | None = None) -> tuple[Timeline, float]:
    """One step in which a worker's forward, input and weight parts take a second a micro-batch; and the idle share."""
    schedule = make_schedule(name, pp, num_micro, stages)
    cost_s = [1 / schedule.stages_per_worker] * schedule.num_stages
    timeline = simulate(schedule, cost_s, cost_s, cost_s)
    return timeline, timeline.makespan_s / (3 * num_micro) - 1


def test_a_layout_knows_all_schedules():
    assert set(SCHEDULES) == set(SCHEDULE_NAMES)


@settings(deadline=None, max_examples=150)
@given(st.sampled_from(sorted(SCHEDULES)), st.integers(1, 7), st.integers(1, 18), st.integers(1, 4))
def test_every_order_does_all_work_once_and_nobody_waits_for_ever(name, pp, num_micro, stages):
    most = SCHEDULES[name].most_stages
    assert fault(make_schedule(name, pp, num_micro, most or stages)) == ""


def test_a_fault_is_found():
    schedule = make_schedule("1f1b", 2, 3)
    forgetful = orders(schedule)
    forgetful[1].pop()
    assert "does not do each backward pass once" in find_fault(forgetful, 2, 3, schedule.worker_of)
    stuck = orders(schedule)
    stuck[0].insert(0, stuck[0].pop())  # a backward pass before its forward pass
    assert find_fault(stuck, 2, 3, schedule.worker_of).startswith("workers wait for each other")


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("pp", "num_micro"), [(2, 2), (4, 8), (4, 16), (8, 8)])
def test_idle_share_is_the_closed_form(name, pp, num_micro):
    timeline, idle = with_equal_costs(name, pp, num_micro)
    assert idle == pytest.approx((pp - 1) / num_micro)
    assert timeline.idle_shares[0] == pytest.approx((pp - 1) / (num_micro + pp - 1))


@pytest.mark.parametrize("name", ["interleaved", "bfs"])
@pytest.mark.parametrize(("pp", "num_micro", "stages"), [(2, 4, 2), (4, 8, 2), (4, 8, 3), (4, 16, 4)])
def test_more_stages_a_worker_divide_the_idle_share(name, pp, num_micro, stages):
    _, idle = with_equal_costs(name, pp, num_micro, stages)
    assert idle == pytest.approx((pp - 1) / (stages * num_micro))


@pytest.mark.parametrize(("pp", "num_micro"), [(2, 8), (4, 8), (4, 16), (8, 32)])
def test_zero_bubble_schedules_idle_less_in_the_memory_of_1f1b(pp, num_micro):
    _, plain = with_equal_costs("1f1b", pp, num_micro)
    h1, idle = with_equal_costs("zb-h1", pp, num_micro)
    v, idle_v = with_equal_costs("zbv", pp, num_micro)
    assert idle < 0.6 * plain
    assert idle_v < 0.4 * plain
    assert max(h1.peak_stored) <= pp
    assert max(v.peak_stored) <= 2 * pp, "of half stages"


@pytest.mark.parametrize("num_micro", [2, 8])
def test_peak_of_stored_micro_batches(num_micro):
    assert with_equal_costs("gpipe", 4, num_micro)[0].peak_stored == (num_micro,) * 4
    assert with_equal_costs("1f1b", 4, num_micro)[0].peak_stored == tuple(
        min(4 - r, num_micro) for r in range(4)
    )


def test_messages_cost_what_they_cost():
    schedule = make_schedule("gpipe", 2, 1)
    assert simulate(schedule, [1, 1], [1, 1], [0, 0], send_s=0.5).makespan_s == pytest.approx(5.0)


def test_zbv_ends_where_it_began():
    schedule = make_schedule("zbv", 3, 4)
    assert [schedule.worker_of(stage) for stage in range(6)] == [0, 1, 2, 2, 1, 0]


def test_impossible_schedules_are_refused_with_a_way_out():
    with pytest.raises(LayoutError, match="there is no pipeline schedule '1f2b'") as error:
        make_schedule("1f2b", 2, 2)
    assert "perhaps '1f1b' was meant" in str(error.value)
    with pytest.raises(LayoutError, match="stages=3 with schedule=1f1b") as error:
        make_schedule("1f1b", 2, 2, 3)
    assert "schedule=interleaved,stages=3" in str(error.value)
    assert dataclasses.astuple(Action("F", 1, 2)) == ("F", 1, 2)
