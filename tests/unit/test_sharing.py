"""Pipelines whose workers share cores: played through, and in forecasts."""

from __future__ import annotations

import random

import pytest
from planning_examples import linked, profile

from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import Correction, Costs, Profile
from paceline.plan.schedules import SCHEDULES, InvalidScheduleError, make_schedule
from paceline.plan.search import layouts, search
from paceline.plan.sharing import Sharing, play_sharing, share_cores, simulate_sharing
from paceline.plan.spans import step_timeline
from paceline.plan.timeline import Hop, simulate
from paceline.records import Cluster, Layout

FREE = Link(name="free", latency_s=0.0, bytes_per_s=1e30)


def drawn_pipeline(drawn: random.Random, name: str):
    pp, micro = drawn.randint(2, 5), drawn.randint(1, 9)
    schedule = make_schedule(name, pp, micro)
    costs_s = [[drawn.choice((0.0, drawn.random())) for _ in range(schedule.num_stages)] for _ in range(3)]
    hops = [
        Hop(drawn.choice((0.0, drawn.random())), drawn.choice((0.0, drawn.random())), drawn.randint(0, 1))
        for _ in range(drawn.choice((0, schedule.num_stages - 1)))
    ]
    return schedule, costs_s, hops


@pytest.mark.parametrize("name", SCHEDULES)
def test_workers_that_do_not_slow_each_other_do_what_they_do_alone(name):
    drawn = random.Random(name)
    for _ in range(20):
        schedule, costs_s, hops = drawn_pipeline(drawn, name)
        rates = (1.0,) * schedule.pp
        found = simulate_sharing(schedule, *costs_s, hops, Sharing((0,) * schedule.pp, rates))
        wanted = simulate(schedule, *costs_s, hops)
        for mine, other in zip(found.spans, wanted.spans, strict=True):
            assert [span.action for span in mine] == [span.action for span in other]
            for one, two in zip(mine, other, strict=True):
                assert (one.begin_s, one.end_s) == pytest.approx((two.begin_s, two.end_s), abs=1e-9)


@pytest.mark.parametrize("name", SCHEDULES)
def test_one_core_is_never_idle_and_does_all_the_work_there_is(name):
    """Each of p workers takes p times as long when all compute: however they wait for each other, the work takes as
    long as in one process, and no bubble is seen."""
    drawn = random.Random(name)
    for _ in range(20):
        schedule, costs_s, _ = drawn_pipeline(drawn, name)
        pp, micro = schedule.pp, schedule.num_micro
        sharing = share_cores([3] * pp, 1, pp, 1, float(pp))
        found = simulate_sharing(schedule, *costs_s, (), sharing)
        assert found.makespan_s == pytest.approx(micro * sum(map(sum, costs_s)) / pp)


def test_who_waits_leaves_the_core_to_the_other_by_hand():
    """Two stages of 2 s forward and 4 s backward with both computing, half of that alone; 1F1B, two micro-batches."""
    schedule = make_schedule("1f1b", 2, 2)
    sharing = share_cores([0, 0], 1, 2, 1, 2.0)
    spans = simulate_sharing(schedule, [2, 2], [2, 2], [2, 2], [Hop(there_s=1.0)], sharing).spans
    times = [[(span.begin_s, span.end_s) for span in mine] for mine in spans]
    # F0 alone to 1; F1 alone to 2, when F0 is at the other worker, which has it to itself to 3, and B0 to 5; its
    # gradients are there at 6. F1 alone from 5 to 6; then both compute B0 and B1 for 4; B1's gradients are there at 11.
    assert times == [
        [(0, 1), (1, 2), (6, 10), (11, 13)],
        [(2, 3), (3, 5), (5, 6), (6, 10)],
    ]


def test_between_one_and_all_workers_are_slowed_down_as_they_are_more_than_cores():
    one_each = share_cores([0, 0, 0, 0, 1, 1, 1, 1], 1, 4, 2, 2.0)
    assert one_each.rates == pytest.approx((2.0, 2.0, 2 / 1.5, 1.0))
    # What slows them down is not that cores are few.
    assert share_cores([0, 0, 0], 1, 3, 8, 1.5).rates == pytest.approx((1.5, 1.5 / 1.25, 1.0))
    # Each stands for two processes.
    assert share_cores([0, 0, 1, 1], 2, 4, 1, 4.0).rates == pytest.approx((2.0, 1.0))


def test_workers_that_wait_for_each_other_are_found():
    orders = [[(0, 0, 0), (3, 0, 0), (0, 0, 1), (3, 0, 1)], [(0, 1, 0), (0, 1, 1), (3, 1, 0), (3, 1, 1)]]
    with pytest.raises(InvalidScheduleError):
        play_sharing(orders, [0, 1], 2, [1.0] * 6, (), share_cores([0, 0], 1, 2, 1, 2.0))


def crowded(slowdown: float, batch_size: int = 16, active: int = 4) -> Profile:
    """Measured alone, and with all of a host's workers, where all takes so many times as long."""
    job = profile((1.0,) * 8, batch_size, (2,))
    (alone,) = job.costs

    def slowed(costs: Costs) -> Costs:
        blocks = tuple(
            b.model_copy(
                update={
                    "forward_s": b.forward_s.scaled(slowdown),
                    "backward_s": b.backward_s.scaled(slowdown),
                }
            )
            for b in costs.blocks
        )
        return costs.model_copy(update={"active": active, "blocks": blocks})

    return job.model_copy(update={"costs": (alone, slowed(alone))})


def test_a_pipeline_on_one_core_has_no_bubble():
    cluster = linked(1, 4, within=FREE)
    host = cluster.cluster.hosts[0].model_copy(update={"cores": 1})
    cluster = cluster.model_copy(update={"cluster": cluster.cluster.model_copy(update={"hosts": (host,)})})
    forecaster = Forecaster(crowded(4.0), cluster)
    one = Forecaster(crowded(4.0), cluster).forecast(Layout(micro=4)).terms
    layout = Layout(pp=4, micro=4)
    terms = forecaster.forecast(layout).terms
    assert terms.compute_s + terms.bubble_s == pytest.approx(one.compute_s)
    assert terms.bubble_s < 0.5 * one.compute_s
    # Enough cores: as ever.
    plenty = Forecaster(crowded(1.0), cluster).forecast(layout).terms
    assert plenty.bubble_s == pytest.approx(plenty.compute_s * 3 / 4)


def test_a_pipeline_that_was_not_tried_is_no_faster_than_a_process_that_was_where_it_can_do_nothing_at_once():
    slow = Correction(ways=("alone",), threads=1, step_s=0.1)
    for job, micro in ((crowded(4.0), 1), (crowded(4.0), 4), (crowded(1.0), 1), (crowded(1.0), 4)):
        host = linked(1, 4, within=FREE).cluster.hosts[0].model_copy(update={"cores": 1})
        cluster = linked(1, 4, within=FREE).model_copy(update={"cluster": Cluster(hosts=(host,))})
        forecaster = Forecaster(job.model_copy(update={"corrections": (slow,)}), cluster)
        alone = forecaster.forecast(Layout(micro=micro, threads=1))
        found = forecaster.forecast(Layout(pp=4, micro=micro, threads=1))
        least_s = alone.step_s - alone.terms.optimizer_s + found.terms.optimizer_s
        nothing_at_once = micro == 1 or job.slowdown(job.costs[1], 8.0) > 3
        assert (found.step_s == pytest.approx(least_s)) == nothing_at_once, (micro, found)
        assert nothing_at_once or found.step_s < 0.6 * least_s


def test_passes_that_are_over_within_a_turn_are_counted_as_long_ones_are():
    """Measured beside another process on one core, what takes a millisecond seems to have it for itself."""
    job = crowded(2.0, active=2)
    alone, all_at_once = job.costs

    def between(short: Curve, long: Curve) -> Curve:
        return Curve(points=((4.0, short(4.0)), (16.0, long(16.0))))

    blocks = tuple(
        b.model_copy(
            update={
                "forward_s": between(a.forward_s, b.forward_s),
                "backward_s": between(a.backward_s, b.backward_s),
            }
        )
        for a, b in zip(alone.blocks, all_at_once.blocks, strict=True)
    )
    fooled = job.model_copy(update={"costs": (alone, all_at_once.model_copy(update={"blocks": blocks}))})
    layout = Layout(pp=2, micro=4)
    right, found = (Forecaster(one, linked(1, 2, within=FREE)).forecast(layout) for one in (job, fooled))
    assert found.terms.compute_s == pytest.approx(right.terms.compute_s)


@pytest.mark.parametrize("seed", range(12))
def test_the_search_finds_the_fastest_of_all_and_timelines_end_with_their_forecasts(seed):
    drawn = random.Random(seed)
    hosts, per_host = drawn.choice(((1, 2), (1, 4), (2, 2)))
    job = crowded(drawn.choice((1.2, 1.6, 2.0, 3.9)), drawn.choice((4, 6, 8)), per_host)
    forecaster = Forecaster(job, linked(hosts, per_host))
    every = list(layouts(forecaster))
    some = drawn.sample(every, min(40, len(every)))
    assert any(map(forecaster.sharing_of, every)) == (job.slowdown(job.costs[1], 8.0) >= 1.3)
    for layout in every:
        least_s = forecaster.least_s(layout)
        assert forecaster.floor_s(layout) <= least_s * (1 + 1e-12), layout
        assert least_s <= forecaster.forecast(layout).step_s * (1 + 1e-12), layout
    best_s = min(forecaster.forecast(layout).step_s for layout in every)
    assert search(forecaster).fastest[0].step_s == pytest.approx(best_s)
    for layout in some:
        forecast, timeline = forecaster.forecast(layout), step_timeline(forecaster, layout)
        assert forecast.terms.bubble_s >= 0, layout
        assert timeline.step_s == forecast.step_s == pytest.approx(forecast.terms.step_s)
        for worker in timeline.workers:
            assert worker.spans[-1].end_s == forecast.step_s
            assert all(span.seconds > 0 for span in worker.spans), layout
        busiest = timeline.workers[timeline.busiest].seconds()
        computed_s = sum(busiest.get(kind, 0.0) for kind in ("forward", "backward", "recompute", "weights"))
        # Exchanges of its actions are taken to be slowed down alike.
        near = pytest.approx(forecast.terms.compute_s, rel=1e-9 if layout.tp == 1 else 0.02)
        assert computed_s == near, layout
