"""Pipeline schedules: each is right for any number of micro-batches, and idles and stores what its source says."""

from __future__ import annotations

import itertools
import time
from typing import ClassVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from paceline.errors import LayoutError
from paceline.plan.schedules import (
    SCHEDULES,
    Action,
    InvalidScheduleError,
    Schedule,
    check,
    make_schedule,
)
from paceline.plan.timeline import Hop, Timeline, simulate
from paceline.records import SCHEDULE_NAMES

costs = st.floats(0.1, 3.0)
workers = st.integers(1, 8)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    name = draw(st.sampled_from(sorted(SCHEDULES)))
    stages = draw(st.integers(1, 4)) if SCHEDULES[name].most_stages is None else None
    return make_schedule(name, draw(workers), draw(st.integers(1, 20)), stages)


def play(
    name: str,
    pp: int,
    num_micro: int,
    cost_s: tuple[float, float, float] = (1, 1, 1),
    stages: int | None = None,
) -> Timeline:
    """With stages that cost the same: `cost_s` of forward, inputs, weights."""
    schedule = make_schedule(name, pp, num_micro, stages)
    return simulate(schedule, *([cost] * schedule.num_stages for cost in cost_s))


def idle_s(
    name: str, pp: int, num_micro: int, cost_s: tuple[float, float, float] = (1, 1, 1), stages: int = 1
) -> float:
    """How much longer a step takes than the work of one worker."""
    given_stages = stages if SCHEDULES[name].most_stages is None else None
    return play(name, pp, num_micro, cost_s, given_stages).makespan_s - sum(cost_s) * num_micro * stages


# Right orders


@settings(deadline=None, max_examples=300)
@given(schedule=schedules())
def test_every_schedule_does_all_work_once_and_nobody_waits_for_ever(schedule):
    check(schedule)


@settings(deadline=None, max_examples=60)
@given(schedule=schedules())
def test_the_kinds_of_a_schedule_are_those_that_it_announces(schedule):
    """By `in_parts` a stage prepares for a backward pass in two parts."""
    kinds = {a.kind for worker in range(schedule.pp) for a in schedule.actions(worker)}
    assert kinds == (set("FIW") if schedule.in_parts else set("FB"))


class Given(Schedule):
    """Orders that a test writes down: `F0.1` is the forward pass of stage 0 on micro-batch 1."""

    name: ClassVar[str] = "given"
    most_stages: ClassVar[int | None] = None

    def __init__(self, *orders: str, num_micro: int = 2, stages: int = 1) -> None:
        super().__init__(len(orders), num_micro, stages)
        self._orders = orders

    def actions(self, worker: int) -> list[Action]:
        words = self._orders[worker].split()
        return [Action(word[0], *map(int, word[1:].split("."))) for word in words]


@pytest.mark.parametrize(
    ("orders", "said"),
    [
        (["F0.0 F0.1 B0.0"], "worker 0 does not do each backward pass once"),
        (["F0.0 B0.0"], "worker 0 does not do each forward pass once"),
        (["F0.0 F0.1 B0.0 B0.1 F0.2 B0.2"], "does not do each forward pass once"),
        (["F0.0 F1.0 F0.1 B0.0 B0.1"], "does not do each forward pass once"),
        (["F0.0 F0.0 F0.1 B0.0 B0.1"], "does not do each forward pass once"),
        (["F0.0 I0.0 F0.1 B0.1"], "does not do each weights pass once"),
        (["F0.0 B0.0 W0.0 F0.1 B0.1"], "does not do each weights pass once"),
        (["F0.0 F0.1 B0.0 B0.1 X0.0"], "does something unknown"),
        (["B0.0 F0.0 F0.1 B0.1"], "wait for each other: worker 0 at Action(kind='B'"),
        (["F0.0 W0.0 I0.0 F0.1 B0.1"], "wait for each other: worker 0 at Action(kind='W'"),
        (["F0.1 F0.0 B0.0 B0.1"], "takes the forward passes of stage 0 as [1, 0]"),
        (["F0.0 F0.1 I0.1 W0.1 B0.0"], "takes the backward passes of stage 0 as [1, 0]"),
        (["F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"], "wait for each other: worker 0 at Action(kind='B'"),
        (["F1.0 F1.1 B1.0 B1.1", "F0.0 F0.1 B0.0 B0.1"], "worker 0 does not do each forward pass once"),
    ],
)
def test_a_wrong_order_is_found(orders, said):
    with pytest.raises(InvalidScheduleError) as caught:
        check(Given(*orders))
    assert said in str(caught.value)


def test_an_order_in_mixed_kinds_is_right():
    check(Given("F0.0 F0.1 B0.0 B0.1", "F1.0 I1.0 F1.1 W1.0 B1.1"))


def test_workers_that_wait_for_each_other_cannot_be_simulated():
    with pytest.raises(InvalidScheduleError, match="wait for each other"):
        simulate(Given("F0.0 B0.0 F0.1 B0.1", "F1.0 F1.1 B1.0 B1.1"), [1, 1], [1, 1], [1, 1])


# The simulation


def test_a_small_step_by_hand():
    """1F1B on two workers, two micro-batches, half a second until a message is there."""
    timeline = simulate(make_schedule("1f1b", 2, 2), [1, 1], [1, 1], [1, 1], [Hop(0.5)])
    times = [[(s.action.kind, s.action.micro, s.begin_s, s.end_s) for s in spans] for spans in timeline.spans]
    assert times == [
        [("F", 0, 0, 1), ("F", 1, 1, 2), ("B", 0, 5, 7), ("B", 1, 8, 10)],
        [("F", 0, 1.5, 2.5), ("B", 0, 2.5, 4.5), ("F", 1, 4.5, 5.5), ("B", 1, 5.5, 7.5)],
    ]
    assert timeline.makespan_s == 10
    assert timeline.idle_shares == pytest.approx((0.4, 0.4))
    assert timeline.idle_share == pytest.approx(0.4)
    assert timeline.peak_stored == (2, 1)


def arrivals(schedule, timeline, send_s, busy_s):
    """When what is sent is there: each worker sends one thing after the other, in the order of its actions."""
    found = {}
    for worker, spans in enumerate(timeline.spans):
        free_s = 0.0
        for span in spans:
            kind, stage = span.action.kind.replace("B", "I"), span.action.stage
            to = stage + 1 if kind == "F" else stage - 1
            if kind != "W" and 0 <= to < schedule.num_stages and schedule.worker_of(to) != worker:
                begin_s = max(free_s, span.end_s)
                free_s = begin_s + busy_s
                found[kind, stage, span.action.micro] = begin_s + send_s
    return found


def test_messages_of_a_worker_wait_for_each_other():
    """GPipe, two workers, a second for each pass; a message takes two, and the next may follow after as many."""
    timeline = simulate(make_schedule("gpipe", 2, 3), [1, 1], [1, 1], [0, 0], [Hop(2, 2)])
    times = [[(s.action.kind, s.begin_s) for s in spans] for spans in timeline.spans]
    assert times == [
        [("F", 0), ("F", 1), ("F", 2), ("B", 11), ("B", 13), ("B", 15)],
        [("F", 3), ("F", 5), ("F", 7), ("B", 8), ("B", 9), ("B", 10)],
    ]


def test_media_do_not_wait_for_each_other():
    """Forwards over a slow cable, backwards within the host: a worker's gradients do not wait for the cable."""
    schedule = Given("F0.0 F0.1 B0.0 B0.1", "F1.0 F1.1 B1.0 B1.1", "F2.0 B2.0 F2.1 B2.1")

    def gradients_come_s(medium):
        hops = [Hop(0.5, 0.5, medium=0), Hop(0.5, 20, medium=medium)]
        return simulate(schedule, [1] * 3, [1] * 3, [0] * 3, hops).spans[0][2].begin_s

    # The middle worker's second output keeps the cable busy from 22.5 to 42.5; its first gradients are ready at 6.5.
    assert gradients_come_s(medium=1) == 7
    assert gradients_come_s(medium=0) == 43


@settings(deadline=None, max_examples=100)
@given(
    schedule=schedules(),
    data=st.data(),
    send_s=st.sampled_from([0.0, 0.3]),
    busy_s=st.sampled_from([0.0, 0.2, 5.0]),
)
def test_each_action_begins_as_soon_as_it_can(schedule, data, send_s, busy_s):
    """Said anew, without the code under test: never before what it needs, never later than it must."""
    n = schedule.num_stages
    each = st.lists(costs, min_size=n, max_size=n)
    forward_s, input_s, weight_s = data.draw(each), data.draw(each), data.draw(each)
    timeline = simulate(schedule, forward_s, input_s, weight_s, [Hop(send_s, busy_s)] * (n - 1))
    there_s = arrivals(schedule, timeline, send_s, busy_s)
    ends_s = {(s.action.kind.replace("B", "I"), s.action.stage, s.action.micro): s.end_s
              for spans in timeline.spans for s in spans}  # fmt: skip
    for worker, spans in enumerate(timeline.spans):
        assert [s.action for s in spans] == schedule.actions(worker)
        free_s = 0.0
        for span in spans:
            kind, stage, micro = span.action.kind, span.action.stage, span.action.micro
            can_s = [free_s]
            if kind == "F" and stage > 0:
                away = schedule.worker_of(stage - 1) != worker
                can_s.append((there_s if away else ends_s)["F", stage - 1, micro])
            if kind in "BI":
                can_s.append(ends_s["F", stage, micro])
            if kind in "BI" and stage < n - 1:
                away = schedule.worker_of(stage + 1) != worker
                can_s.append((there_s if away else ends_s)["I", stage + 1, micro])
            if kind == "W":
                can_s.append(ends_s["I", stage, micro])
            assert span.begin_s == pytest.approx(max(can_s))
            cost_s = {"F": forward_s, "I": input_s, "W": weight_s}
            wanted_s = input_s[stage] + weight_s[stage] if kind == "B" else cost_s[kind][stage]
            assert span.end_s - span.begin_s == pytest.approx(wanted_s)
            free_s = span.end_s


def test_a_message_within_a_worker_takes_no_time():
    """Down and up again: the last stage of the way down and the first of the way up are on one worker."""
    schedule = make_schedule("zbv", 2, 1)
    ones = [1.0] * 4
    begins_s = {s.action.stage: s.begin_s for spans in simulate(schedule, ones, ones, ones, [Hop(10.0)] * 3).spans
                for s in spans if s.action.kind == "F"}  # fmt: skip
    assert begins_s == {0: 0, 1: 11, 2: 12, 3: 23}


def test_a_step_without_cost_is_not_idle():
    assert play("1f1b", 2, 2, (0, 0, 0)).idle_shares == (0, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_large_step_is_simulated_in_little_time(name):
    seconds = []
    for _ in range(5):
        begin_s = time.process_time()
        play(name, 8, 64)
        seconds.append(time.process_time() - begin_s)
    assert min(seconds) < 0.1


# What the schedules say of themselves


@settings(deadline=None, max_examples=100)
@given(
    name=st.sampled_from(["gpipe", "1f1b"]),
    pp=workers,
    num_micro=st.integers(1, 20),
    f=costs,
    i=costs,
    w=costs,
)
def test_gpipe_and_1f1b_idle_for_the_closed_form(name, pp, num_micro, f, i, w):
    timeline = play(name, pp, num_micro, (f, i, w))
    assert idle_s(name, pp, num_micro, (f, i, w)) / (num_micro * (f + i + w)) == pytest.approx(
        (pp - 1) / num_micro
    )
    share = (pp - 1) / (num_micro + pp - 1)
    assert timeline.idle_shares == pytest.approx((share,) * pp)
    assert timeline.idle_share == pytest.approx(share)


@settings(deadline=None, max_examples=60)
@given(pp=workers, rounds=st.integers(1, 4), v=st.integers(1, 4), f=costs, i=costs, w=costs)
def test_interleaved_divides_the_idle_share_by_the_stages(pp, rounds, v, f, i, w):
    num_micro = rounds * pp
    ideal_s = num_micro * v * (f + i + w)
    assert idle_s("interleaved", pp, num_micro, (f, i, w), v) / ideal_s == pytest.approx(
        (pp - 1) / (v * num_micro)
    )


@settings(deadline=None, max_examples=60)
@given(pp=workers, more=st.integers(0, 12), v=st.integers(1, 4), f=costs, i=costs, w=costs)
def test_breadth_first_divides_the_idle_share_by_the_stages(pp, more, v, f, i, w):
    num_micro = pp + more
    ideal_s = num_micro * v * (f + i + w)
    assert idle_s("bfs", pp, num_micro, (f, i, w), v) / ideal_s == pytest.approx((pp - 1) / (v * num_micro))


@settings(deadline=None, max_examples=100)
@given(pp=workers, more=st.integers(0, 12), f=costs, i=costs, part=st.floats(0, 1))
def test_zb_h1_idles_for_the_published_time(pp, more, f, i, part):
    w = part * min(f, i)
    assert idle_s("zb-h1", pp, pp + more, (f, i, w)) == pytest.approx((pp - 1) * (f + i - w), abs=1e-9)


@pytest.mark.parametrize("pp", [2, 4, 8])
def test_zb_h1_idles_for_a_third_of_1f1b_in_the_same_memory(pp):
    for num_micro in (pp, 2 * pp, 4 * pp + 1):
        assert idle_s("zb-h1", pp, num_micro) == idle_s("1f1b", pp, num_micro) / 3
        assert max(play("zb-h1", pp, num_micro).peak_stored) == max(play("1f1b", pp, num_micro).peak_stored)


@settings(deadline=None, max_examples=100)
@given(pp=workers, num_micro=st.integers(1, 20), f=costs, i=costs, w=costs)
def test_zb_h1_is_never_slower_than_1f1b(pp, num_micro, f, i, w):
    assert idle_s("zb-h1", pp, num_micro, (f, i, w)) <= idle_s("1f1b", pp, num_micro, (f, i, w)) + 1e-9


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_zbv_idles_next_to_nothing_with_many_micro_batches(pp):
    for num_micro in (2 * pp, 3 * pp + 1, 64):
        assert idle_s("zbv", pp, num_micro, stages=2) == pp - 1
        assert play("zbv", pp, num_micro).idle_share == pytest.approx((pp - 1) / (6 * num_micro + pp - 1))
    assert play("zbv", pp, 64).idle_share < play("1f1b", pp, 64).idle_share / 5


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_zbv_idles_as_little_with_one_micro_batch_for_each_worker(pp):
    assert idle_s("zbv", pp, pp, stages=2) == pp - 1


@pytest.mark.parametrize("pp", [2, 3, 4, 8])
def test_zbv_with_few_micro_batches_idles_less_than_1f1b(pp):
    """One of its stages is half a stage of 1F1B: six units against three of twice the cost."""
    for num_micro in range(1, 2 * pp):
        assert idle_s("zbv", pp, num_micro, stages=2) < idle_s("1f1b", pp, num_micro, (2, 2, 2))


@settings(deadline=None, max_examples=60)
@given(pp=workers, num_micro=st.integers(1, 20))
def test_schedules_of_one_stage_store_what_they_say(pp, num_micro):
    assert play("gpipe", pp, num_micro).peak_stored == (num_micro,) * pp
    assert play("1f1b", pp, num_micro).peak_stored == tuple(min(pp - r, num_micro) for r in range(pp))
    assert play("zb-h1", pp, num_micro).peak_stored == (min(pp, num_micro),) * pp


@settings(deadline=None, max_examples=60)
@given(pp=workers, num_micro=st.integers(1, 20), v=st.integers(1, 4))
def test_schedules_of_several_stages_store_what_they_say(pp, num_micro, v):
    assert play("bfs", pp, num_micro, stages=v).peak_stored == (num_micro * v,) * pp
    assert max(play("zbv", pp, num_micro).peak_stored) == min(2 * pp, 2 * num_micro)
    stored = play("interleaved", pp, num_micro, stages=v).peak_stored
    bounds = [min(2 * (pp - r - 1) + (v - 1) * pp + 1, v * num_micro) for r in range(pp)]
    if num_micro % pp == 0:
        assert list(stored) == bounds
    else:
        assert all(s <= b for s, b in zip(stored, bounds, strict=True))


@settings(deadline=None, max_examples=60)
@given(schedule=schedules())
def test_the_last_batch_of_an_epoch_never_needs_more_memory(schedule):
    stages = schedule.stages_per_worker if schedule.most_stages is None else None
    peaks = [max(play(schedule.name, schedule.pp, m, stages=stages).peak_stored)
             for m in range(1, schedule.num_micro + 1)]  # fmt: skip
    assert peaks == sorted(peaks)


@settings(deadline=None, max_examples=60)
@given(pp=workers, num_micro=st.integers(1, 20), v=st.integers(1, 4))
def test_an_interleaved_round_that_is_not_full_takes_no_longer_than_a_full_one(pp, num_micro, v):
    full = -(-num_micro // pp) * pp
    one, other = (play("interleaved", pp, m, stages=v).makespan_s for m in (num_micro, full))
    assert one <= other


# Asking for one


def test_a_layout_names_the_same_schedules():
    assert tuple(SCHEDULES) == SCHEDULE_NAMES
    assert all(name == schedule.name for name, schedule in SCHEDULES.items())


def test_stages_lie_on_workers_in_turn_or_down_and_up():
    looped, v_shaped = make_schedule("interleaved", 4, 8, 3), make_schedule("zbv", 3, 8)
    assert [looped.worker_of(s) for s in range(looped.num_stages)] == [0, 1, 2, 3] * 3
    assert [v_shaped.worker_of(s) for s in range(v_shaped.num_stages)] == [0, 1, 2, 2, 1, 0]
    assert [v_shaped.stages_of(w) for w in range(3)] == [[0, 5], [1, 4], [2, 3]]


@pytest.mark.parametrize(
    ("name", "stages"),
    [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("bfs", 2), ("zb-h1", 1), ("zbv", 2)],
)
def test_every_schedule_has_its_own_number_of_stages(name, stages):
    assert make_schedule(name, 3, 4).num_stages == 3 * stages
    assert make_schedule(name, 3, 4, stages).num_stages == 3 * stages


def test_an_unknown_schedule_names_the_nearest_and_all():
    with pytest.raises(LayoutError) as caught:
        make_schedule("interleave", 2, 4)
    text = str(caught.value)
    assert "no pipeline schedule 'interleave'" in text
    assert "perhaps 'interleaved' was meant" in text
    assert all(name in caught.value.next_step for name in SCHEDULES)


@pytest.mark.parametrize(
    ("name", "sizes", "said"),
    [
        (
            "1f1b",
            (2, 4, 3),
            ["stages=3 with schedule=1f1b", "1 stage\n", "stages=1, or schedule=interleaved,stages=3"],
        ),
        ("zbv", (2, 4, 1), ["stages=1 with schedule=zbv", "2 stages\n", "use stages=2"]),
        ("zb-h1", (0, 4, None), ["pp=0 with schedule=zb-h1", "use pp=1"]),
        ("gpipe", (2, 0, None), ["micro=0 with schedule=gpipe", "use micro=1"]),
        ("interleaved", (2, 4, 0), ["stages=0 with schedule=interleaved", "use stages=2"]),
    ],
)
def test_a_size_that_a_schedule_cannot_take_is_named_with_one_that_it_can(name, sizes, said):
    with pytest.raises(LayoutError) as caught:
        make_schedule(name, *sizes)
    assert all(words in str(caught.value) for words in said), str(caught.value)


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_small_pipeline_is_right(name):
    """The sizes that people use first, without leaving any to chance."""
    for pp, num_micro in itertools.product(range(1, 5), range(1, 10)):
        check(make_schedule(name, pp, num_micro))
