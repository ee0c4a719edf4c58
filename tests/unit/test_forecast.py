"""The planner's arithmetic, against forms that can be computed by hand and against looking at everything."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from planning_examples import (
    CABLE,
    GIB,
    MEMORY,
    linked,
    profile,
    random_linked,
    random_profile,
    random_tried,
    sending,
)

from paceline.errors import LayoutError
from paceline.plan import links
from paceline.plan.curves import Curve
from paceline.plan.cuts import partition
from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.forecast import Forecaster
from paceline.plan.links import KINDS, Link, MeasuredCollective, Placement
from paceline.plan.profile import Block, Correction, Costs, Profile, Tried
from paceline.plan.room import room_bytes
from paceline.plan.scaling import find_knee, scaling
from paceline.plan.schedules import SCHEDULES, make_schedule
from paceline.plan.search import layouts, search
from paceline.plan.terms import Forecast, Memory, Terms
from paceline.plan.timeline import Hop, coded, makespan_s, simulate
from paceline.records import Layout

SEEDS = range(25)


def test_a_curve_goes_through_its_points_and_on():
    curve = Curve.of({1: 2.0, 2: 3.0, 4: 7.0})
    assert [curve(x) for x in (0, 1, 1.5, 2, 3, 4, 6)] == pytest.approx([1.0, 2.0, 2.5, 3.0, 5.0, 7.0, 11.0])
    assert Curve(points=((4.0, 2.0),))(8) == 4.0
    assert Curve.line(1.0, 0.5)(10) == 6.0


def test_a_curve_never_falls_and_averages_what_noise_turned_round():
    curve = Curve.of({1: 1.0, 2: 3.0, 3: 2.0, 4: 1.5, 5: 8.0})
    assert [cost for _, cost in curve.points] == pytest.approx([1.0, 6.5 / 3, 6.5 / 3, 6.5 / 3, 8.0])
    values = [curve(x / 10) for x in range(80)]
    assert values == sorted(values)


@pytest.mark.parametrize("points", [(), ((1.0, 2.0), (1.0, 3.0)), ((1.0, 2.0), (2.0, 1.0)), ((-1.0, 0.0),)])
def test_what_is_no_curve_is_refused(points):
    with pytest.raises(ValueError):  # noqa: PT011 - pydantic's error is one
        Curve(points=points)


def test_formulas_of_collectives():
    link = Link(name="a", latency_s=1e-5, bytes_per_s=1e9)
    b = 8e6
    assert link.seconds("all-reduce", 4, b) == pytest.approx(6e-5 + 1.5 * b / 1e9)
    assert link.seconds("all-gather", 4, b) == pytest.approx(3e-5 + 0.75 * b / 1e9)
    assert link.seconds("broadcast", 8, b) == pytest.approx(3e-5 + b / 1e9)
    assert link.seconds("message", 2, b) == pytest.approx(1e-5 + b / 1e9)
    shared = link.model_copy(update={"is_shared": True})
    assert shared.seconds("all-reduce", 4, b) == pytest.approx(6e-5 + 4 * 1.5 * b / 1e9)
    # The next message needs the way for as long as its bytes take.
    assert link.seconds("stream", 2, b) == pytest.approx(b / 1e9)
    with pytest.raises(ValueError, match="no collective 'gossip'"):
        link.seconds("gossip", 2, b)


def test_what_was_measured_stands_in_place_of_the_formula():
    measured = MeasuredCollective(
        kind="all-reduce", workers=2, seconds=Curve(points=((4.0, 2e-4), (1e6, 1.2e-3)))
    )
    link = Link(name="a", latency_s=1.0, bytes_per_s=1.0, measured=(measured,))
    assert link.seconds("all-reduce", 2, 1e6) == pytest.approx(1.2e-3)
    # Four workers: three times as many messages, and 1.5 instead of 1.0 times the bytes.
    assert link.seconds("all-reduce", 4, 1e6) == pytest.approx(3 * 2e-4 + 1.5 * 1e-3)


def test_messages_take_what_they_took_however_many_workers_there_were():
    kinds = ("message", "stream")
    curve = Curve(points=((4.0, 2e-4), (1e6, 1.2e-3)))
    measured = tuple(MeasuredCollective(kind=kind, workers=8, seconds=curve) for kind in kinds)
    link = Link(name="a", latency_s=1.0, bytes_per_s=1.0, measured=measured)
    assert all(link.seconds(kind, 2, 1e6) == pytest.approx(1.2e-3) for kind in kinds)


def test_each_cut_of_a_pipeline_has_its_own_way_and_bytes():
    """Four stages over two hosts of two workers: only the middle cut crosses, and nobody shares its cable."""
    forecaster = Forecaster(profile((1.0,) * 4, 16, ()), linked(2, 2))
    hops = forecaster.parts(Layout(pp=4, micro=4)).sending.hops
    within, cable = forecaster.linked.within, forecaster.linked.between
    assert cable is not None
    num_bytes = forecaster.stages_of(Layout(pp=4, micro=4))[0].output_bytes
    assert [hop.there_s for hop in hops] == pytest.approx(
        [link.seconds("message", 2, num_bytes) for link in (within, cable, within)]
    )
    assert [hop.busy_s for hop in hops] == pytest.approx(
        [link.seconds("stream", 2, num_bytes) for link in (within, cable, within)]
    )
    assert hops[0].medium == hops[2].medium != hops[1].medium


def test_pipelines_that_share_a_cable_wait_for_each_others_messages():
    forecaster = Forecaster(profile((1.0,) * 4, 16, ()), linked(2, 2))
    cable = forecaster.linked.between
    assert cable is not None
    layout = Layout(pp=2, dp_replicate=2, micro=2)
    sent = forecaster.parts(layout).sending
    num_bytes = forecaster.stages_of(layout)[0].output_bytes
    (hop,) = sent.hops
    # Each is there as soon as it would be alone; the next may follow when both pipelines have sent theirs.
    assert hop.there_s == pytest.approx(cable.seconds("message", 2, num_bytes))
    assert hop.busy_s == pytest.approx(cable.seconds("stream", 2, 2 * num_bytes))
    assert sent.behind_s == pytest.approx(hop.busy_s / 2)
    more = layout.model_copy(update={"micro": 4})
    assert forecaster.parts(more).sending.behind_s == pytest.approx(sent.behind_s / 2)


def test_several_hosts_send_each_byte_once_over_their_cable():
    b = 1e7
    within = Link(name="m", latency_s=0.0, bytes_per_s=1e15)
    cable = Link(name="c", latency_s=0.0, bytes_per_s=1e8)
    place = Placement(hosts=2, per_host=4)
    assert links.seconds(within, cable, "all-reduce", place, b) == pytest.approx(b / 1e8, rel=1e-3)
    assert links.seconds(within, cable, "all-gather", place, b) == pytest.approx(0.5 * b / 1e8, rel=1e-3)
    # Four groups of one worker on each host use the cable at once.
    apart = Placement(hosts=2, per_host=1, beside=4)
    assert links.seconds(within, cable, "all-reduce", apart, b) == pytest.approx(4 * b / 1e8)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_row_is_cut_where_the_largest_part_is_smallest(seed):
    drawn = random.Random(seed)
    costs = [drawn.choice((0.0, 1.0, 1.0, 2.5, drawn.random())) for _ in range(drawn.randint(3, 9))]
    number = drawn.randint(1, len(costs))
    bounds = partition(costs, number)
    assert bounds[0] == 0
    assert bounds[-1] == len(costs)
    assert all(a < b for a, b in itertools.pairwise(bounds)), bounds
    largest = max(sum(costs[a:b]) for a, b in itertools.pairwise(bounds))
    assert partition(costs, number, speeds=[0.7] * number) == bounds
    every = itertools.combinations(range(1, len(costs)), number - 1)
    least = min(
        max(sum(costs[a:b]) for a, b in itertools.pairwise((0, *inner, len(costs)))) for inner in every
    )
    assert largest == pytest.approx(least, rel=1e-6, abs=1e-12)


@pytest.mark.parametrize("seed", SEEDS)
def test_of_cuts_that_are_hardly_slower_the_one_that_sends_least_is_taken(seed):
    drawn = random.Random(seed)
    length = drawn.randint(2, 10)
    costs = [drawn.choice((0.0, 1.0, 1.02, 2.0, drawn.random())) for _ in range(length)]
    sends = [float(drawn.randint(0, 3)) for _ in costs]
    sizes = [float(drawn.randint(0, 9)) for _ in costs]
    number = drawn.randint(1, length)
    speeds = drawn.choice(([], [drawn.choice((0.4, 1.0, 1.5)) for _ in range(number)]))
    inner = itertools.combinations(range(1, length), number - 1)
    every = [(0, *cuts, length) for cuts in inner]

    def most(of: list[float], bounds: Sequence[int], over: Sequence[float]) -> float:
        return max(sum(of[a:b]) / by for (a, b), by in zip(itertools.pairwise(bounds), over, strict=True))

    alike, over = [1.0] * number, speeds or [1.0] * number
    largest = drawn.choice((math.inf, 1.1 * min(most(sizes, bounds, alike) for bounds in every)))
    every = [bounds for bounds in every if most(sizes, bounds, alike) <= largest]
    quickest = min(most(costs, bounds, over) for bounds in every)
    near = [bounds for bounds in every if most(costs, bounds, over) <= quickest * 1.05 + 1e-12]
    wanted = min((sum(sends[at - 1] for at in b[1:-1]), most(costs, b, over)) for b in near)
    found = partition(costs, number, sends=sends, sizes=sizes, largest=largest, speeds=speeds)
    assert tuple(found) in every
    assert sum(sends[at - 1] for at in found[1:-1]) == wanted[0]
    assert most(costs, found, over) == pytest.approx(wanted[1])


def test_a_slow_part_may_begin_before_those_ahead_of_it_have_to_end():
    """With as much as fits in the first of three, the second would begin with what is too large for it."""
    assert partition([2.0, 1.0, 3.0, 0.1], 3, speeds=[1.0, 0.5, 1.0]) == [0, 1, 2, 4]
    sends = [1.0, 0.0, 0.0, 0.0]
    assert partition([2.0, 1.0, 3.0, 0.1], 3, sends=sends, speeds=[1.0, 0.5, 1.0]) == [0, 1, 2, 4]


def test_stages_go_by_the_speed_of_who_computes_them():
    job = profile((1.0,) * 6, 16, ())
    layout = Layout(pp=2, dp_replicate=2, micro=2)
    even, uneven = (
        Forecaster(job, linked(2, 2, speeds=speeds)).stages_of(layout) for speeds in ((), (1.0, 0.5))
    )
    assert [stage.num_blocks for stage in even] == [3, 3]
    assert [stage.num_blocks for stage in uneven] == [4, 2]
    assert uneven[0].busy_s == pytest.approx(even[0].busy_s * 4 / 3)
    assert uneven[1].busy_s == pytest.approx(uneven[0].busy_s)
    # What hosts differ by from measurement to measurement moves no cut, and is counted.
    nearly = Forecaster(job, linked(2, 2, speeds=(1.0, 0.9))).stages_of(layout)
    assert [stage.num_blocks for stage in nearly] == [3, 3]
    assert nearly[1].busy_s == pytest.approx(even[1].busy_s / 0.9)
    # Copies of a stage on both hosts are as fast as the slower.
    alike, unequal = (
        Forecaster(job, linked(2, 1, speeds=speeds)).stages_of(Layout(dp_replicate=2))[0]
        for speeds in ((), (1.0, 0.5))
    )
    assert unequal.busy_s == pytest.approx(2 * alike.busy_s)


def test_what_follows_the_last_piece_is_no_stage_of_its_own():
    job = profile((1.0, 1.0, 1.0, 0.2), 16, ())
    (costs,) = job.costs[:1]
    *blocks, last = costs.model
    closing = costs.model_copy(
        update={"blocks": (*blocks, last.model_copy(update={"closes": True})), "row": ()}
    )
    forecaster = Forecaster(job.model_copy(update={"costs": (closing,)}), linked(4, 1))
    assert [stage.num_blocks for stage in forecaster.stages_of(Layout(pp=3, micro=4))] == [1, 1, 2]
    with pytest.raises(LayoutError, match="has 4 stages, and the model 3 blocks"):
        forecaster.forecast(Layout(pp=4, micro=4))
    assert max(layout.pp for layout in layouts(forecaster)) == 3


def test_one_process_is_the_sum_of_its_blocks():
    found = Forecaster(profile(), linked()).forecast(Layout())
    # Six blocks of 6.5 times 1 + 2 ms a sample, and 0.1 + 0.2 ms a micro-batch.
    assert found.terms.compute_s == pytest.approx(6.5 * (16 * 3e-3 + 3e-4))
    assert found.terms.optimizer_s == pytest.approx(6.5 * 4e7 * 1e-10)
    assert found.terms.data_s == pytest.approx(16e-5)
    assert found.step_s == pytest.approx(6.5 * 48.3e-3 + 0.026 + 16e-5 + 1e-4)
    parameters = int(6.5 * 4e7)
    assert found.memory == Memory(
        base=GIB // 4,
        parameters=parameters,
        # At the worst moment, the last block's backward pass: what all have saved, and its own gradients.
        gradients=2 * 40_000_000,
        state=2 * parameters,
        saved=int(6.5 * 3e6 * 16),
        temporary=16_000_000,
    )


def test_workers_of_a_host_share_the_update():
    both = [
        Forecaster(profile(shares_update=shares), linked()).forecast(Layout(dp_replicate=4))
        for shares in (True, False)
    ]
    b = 6.5 * 4e7
    assert both[0].terms.optimizer_s == pytest.approx(both[1].terms.optimizer_s / 4)
    assert both[0].terms.gradients_s == pytest.approx((b + 3 * b / 4) * 5e-11)
    assert both[1].terms.gradients_s == pytest.approx(2 * b * 5e-11 + 6e-5 + 4 * 1.5 * b / 5e9)
    # Of parameters and state a worker takes its share of what the host has once; it maps the others' shares, and reads
    # their gradients of its own.
    assert both[0].memory.mapped == pytest.approx(3 * b / 4 + 3 * b / 4)
    assert both[0].memory.own == both[0].memory.total - both[0].memory.mapped
    assert both[0].memory.parameters == pytest.approx(b / 4)
    assert both[0].memory.gradients == pytest.approx(b)
    assert both[0].memory.state == pytest.approx(both[1].memory.state / 4)


def test_pipelines_without_messages_take_what_the_closed_forms_say():
    """Even stages: idle are (p-1)/m of the work, (p-1)/(v m) with v stages a worker (Narayanan et al. 2021)."""
    free = Link(name="free", latency_s=0.0, bytes_per_s=1e30)
    job = profile((1.0,) * 8, 32, ())
    forecaster = Forecaster(job, linked(within=free))
    for pp, micro in ((2, 4), (4, 8), (4, 16)):
        for schedule, stages, v in (("gpipe", None, 1), ("1f1b", None, 1), ("interleaved", 2, 2)):
            layout = Layout(pp=pp, micro=micro, schedule=schedule, stages=stages)
            terms = forecaster.forecast(layout).terms
            assert terms.messages_s == 0
            assert terms.bubble_s == pytest.approx(terms.compute_s * (pp - 1) / (v * micro)), layout


@pytest.mark.parametrize("seed", SEEDS)
def test_the_quick_makespan_is_that_of_the_whole_timeline(seed):
    drawn = random.Random(seed)
    for name in SCHEDULES:
        pp, micro = drawn.randint(2, 5), drawn.randint(1, 9)
        schedule = make_schedule(name, pp, micro)
        costs_s = [[drawn.random() for _ in range(schedule.num_stages)] for _ in range(3)]
        hops = [
            Hop(
                drawn.choice((0.0, drawn.random())),
                drawn.choice((0.0, 2 * drawn.random())),
                drawn.randint(0, 1),
            )
            for _ in range(drawn.choice((0, schedule.num_stages - 1)))
        ]
        found = makespan_s(
            [coded(schedule.actions(worker)) for worker in range(pp)],
            [schedule.worker_of(stage) for stage in range(schedule.num_stages)],
            micro,
            [seconds for of_stage in zip(*costs_s, strict=True) for seconds in of_stage],
            hops,
        )
        assert found == pytest.approx(simulate(schedule, *costs_s, hops).makespan_s), (name, pp, micro)


def test_what_is_computed_again_takes_the_time_of_its_forward_pass():
    forecaster = Forecaster(profile(), linked())
    plain, full, part = (forecaster.forecast(Layout(recompute=r)) for r in ("none", "full", "selective"))
    forward_s = 6.5 * (16e-3 + 1e-4)
    assert full.terms.compute_s - plain.terms.compute_s == pytest.approx(forward_s)
    assert part.terms.compute_s - plain.terms.compute_s == pytest.approx(forward_s / 2)
    assert full.memory.saved < part.memory.saved < plain.memory.saved


def test_what_is_computed_again_takes_what_was_measured():
    """Of a forward pass over so many samples: between two numbers of samples on the line, beyond them as there."""
    shares = {"selective": ((4.0, 3.0), (16.0, 1.0))}
    forecaster = Forecaster(profile().model_copy(update={"recomputed_shares": shares}), linked())
    for micro, share in ((1, 1.0), (2, 2.0 + 1 / 3), (4, 3.0), (8, 3.0)):
        plain, part = (forecaster.forecast(Layout(recompute=r, micro=micro)) for r in ("none", "selective"))
        forward_s = 6.5 * (16e-3 + micro * 1e-4)
        assert part.terms.compute_s - plain.terms.compute_s == pytest.approx(share * forward_s), micro
    full = forecaster.forecast(Layout(recompute="full")).terms.compute_s
    assert full - forecaster.forecast(Layout()).terms.compute_s == pytest.approx(6.5 * (16e-3 + 1e-4))


def drawn_case(seed: int, *, tried: bool = False) -> tuple[Forecaster, list[Layout]]:
    drawn = random.Random(seed)
    job, cluster = random_profile(drawn), random_linked(drawn)
    forecaster = Forecaster(random_tried(drawn, job, cluster) if tried else job, cluster)
    return forecaster, list(layouts(forecaster))


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_terms_add_up_and_no_bound_is_above_its_forecast(seed, tried):
    forecaster, every = drawn_case(seed, tried=tried)
    assert every
    bounds_s = {layout: forecaster.least_s(layout) for layout in every}
    for layout in every:
        found = forecaster.forecast(layout)
        parts = [getattr(found.terms, name) for name in Terms.model_fields]
        assert tried or all(part >= -1e-12 for part in parts), (layout, found.terms)
        assert sum(parts) == pytest.approx(found.step_s)
        assert found.memory.total == sum(getattr(found.memory, name) for name in Memory.model_fields)
        assert forecaster.floor_s(layout) <= bounds_s[layout] * (1 + 1e-9), layout
        # A search bounds what computes something again by what does not.
        for bounded in (layout, layout.model_copy(update={"recompute": "none"})):
            assert bounds_s[bounded] <= found.step_s * (1 + 1e-9), (layout, bounded)


@pytest.mark.parametrize("tried", [False, True])
@pytest.mark.parametrize("seed", SEEDS)
def test_the_search_finds_what_looking_at_everything_finds(seed, tried):
    forecaster, every = drawn_case(seed, tried=tried)

    def fits(forecast: Forecast) -> bool:
        return forecaster.needed_bytes(forecast.layout) <= room_bytes(forecaster.linked, forecast.layout)

    fitting: dict[Layout, Forecast] = {}
    for forecast in map(forecaster.forecast, every):
        if fits(forecast):
            # With more computed again it is slower, and no choice.
            same = forecast.layout.model_copy(update={"recompute": "none"})
            fitting[same] = min(forecast, fitting.get(same, forecast), key=lambda f: f.step_s)
    if not fitting:
        with pytest.raises(LayoutError, match="no layout fits: the nearest"):
            search(forecaster)
        return
    chosen, *others = search(forecaster, number=5).fastest
    by_time = sorted(fitting.items(), key=lambda item: item[1].step_s)
    assert chosen.step_s <= by_time[0][1].step_s * 1.03
    same = chosen.layout.model_copy(update={"recompute": "none"})
    wanted = [forecast.step_s for layout, forecast in by_time if layout != same][:4]
    assert [forecast.step_s for forecast in others] == pytest.approx(wanted)
    assert all(map(fits, (chosen, *others)))


@pytest.mark.parametrize("seed", SEEDS)
def test_more_memory_never_shrinks_the_choice(seed):
    forecaster, every = drawn_case(seed)
    needed = sorted(forecaster.forecast(layout).memory.own for layout in every)
    fastest = []
    for room in (needed[0], needed[len(needed) // 2], needed[-1]):
        found = search(forecaster, number=len(every), memory_bytes=room, margin=0.0)
        fastest.append(found.fastest[0].step_s)
    assert fastest == sorted(fastest, reverse=True)


@pytest.mark.parametrize("seed", SEEDS)
def test_a_faster_link_makes_nothing_slower(seed):
    forecaster, every = drawn_case(seed)
    there = forecaster.linked
    for name in ("within", "between"):
        link: Link | None = getattr(there, name)
        if link is None:
            continue
        faster = link.model_copy(
            update={"bytes_per_s": link.bytes_per_s * 3, "latency_s": link.latency_s / 2}
        )
        other = Forecaster(forecaster.profile, there.model_copy(update={name: faster}))
        for layout in every:
            assert other.forecast(layout).step_s <= forecaster.forecast(layout).step_s * (1 + 1e-9), layout


def test_a_pipeline_is_cut_where_the_step_is_fastest():
    """Four blocks of about 3 s a step: between the middle ones 2 MB cross for each sample, after the third 10 kB."""
    job = sending(profile((1.0, 1.0, 1.0, 1.0)), 1e6, 2e6, 1e4, 1e4)
    two = Layout(pp=2, micro=4)
    slow = CABLE.model_copy(update={"bytes_per_s": 1.25e7})
    over = [Forecaster(job, linked(2, 1, between=cable)) for cable in (MEMORY, CABLE, slow)]
    assert [forecaster.cuts_of(two) for forecaster in over] == [(0, 2, 4), (0, 3, 4), (0, 3, 4)]
    whole_s = over[0].forecast(Layout()).terms.compute_s
    assert over[-1].forecast(two).step_s < whole_s < 4 * 4 * 2 * 2e6 / 1.25e7
    assert over[-1].forecast(two).memory.parameters == 3 * 4e7


def test_where_a_pipeline_is_cut_does_not_depend_on_what_was_tried():
    """It was tried as it was cut before anything had been tried."""
    job = sending(profile((1.0, 1.0, 1.0, 1.0)), 1e6, 2e6, 1e4, 1e4)
    two, target = Layout(pp=2, micro=4), linked(2, 1)
    before = Forecaster(job, target)
    costly = Correction(ways=("pipeline",), workers=2, over_network=True, action_s=0.2)
    tried = Tried(layout=two, step_s=2 * before.forecast(two).step_s)
    after = Forecaster(job.model_copy(update={"corrections": (costly,), "tried": (tried,)}), target)
    assert after.forecast(two).step_s > 1.5 * before.forecast(two).step_s
    assert after.cuts_of(two) == before.cuts_of(two) == (0, 3, 4)


def test_no_cuts_of_a_layout_that_cannot_be():
    forecaster = Forecaster(profile(), linked(1, 2))
    assert forecaster.cuts_of(Layout(pp=3)) == ()
    assert forecaster.cuts_of(Layout(pp=2, micro=5)) == ()
    assert forecaster.cuts_of(Layout()) == (0, 6)


def test_a_collective_of_more_bytes_never_takes_less():
    for kind in KINDS:
        for place in (
            Placement(hosts=1, per_host=4),
            Placement(hosts=3, per_host=2),
            Placement(hosts=2, per_host=1),
        ):
            times = [links.seconds(MEMORY, CABLE, kind, place, float(b)) for b in (0, 1, 1e3, 1e6, 1e9)]
            assert times == sorted(times), (kind, place)


def test_groups_are_where_the_ranks_of_the_mesh_are():
    forecaster = Forecaster(profile(batch_size=16), linked(2, 4))
    layout = Layout(pp=2, dp_replicate=2, tp=2)
    # Outermost first: pp apart by 4, data by 2, tp by 1; a host has 4.
    assert forecaster.place(layout, "tp") == Placement(hosts=1, per_host=2, beside=2)
    assert forecaster.place(layout, "data") == Placement(hosts=1, per_host=2, beside=2)
    assert forecaster.place(layout, "pp") == Placement(hosts=2, per_host=1, beside=4)
    assert forecaster.place(Layout(dp_replicate=8), "data") == Placement(hosts=2, per_host=4, beside=1)


def test_an_unequal_host_slows_all_down():
    even = Forecaster(profile(), linked(2, 2)).forecast(Layout(dp_replicate=4))
    slow = Forecaster(profile(), linked(2, 2, speeds=(1.0, 0.5))).forecast(Layout(dp_replicate=4))
    assert slow.terms.compute_s == pytest.approx(2 * even.terms.compute_s)
    # Two workers are both on the first host.
    first, two = (
        Forecaster(profile(), linked(2, 2, speeds=speeds)).forecast(Layout(dp_replicate=2))
        for speeds in ((1.0, 0.5), ())
    )
    assert first == two


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        (Layout(dp_replicate=3), "16 samples cannot be divided"),
        (Layout(dp_replicate=16), "needs 16 workers, and there are 4"),
        (Layout(tp=4), "what tp=4 makes of the model was not measured"),
        (Layout(pp=4, micro=4, schedule="interleaved", stages=2), "has 8 stages, and the model 6 blocks"),
    ],
)
def test_what_cannot_be_is_said(layout, words):
    with pytest.raises(LayoutError, match=words):
        Forecaster(profile(), linked()).forecast(layout)


def test_records_go_to_json_and_back():
    job, there = profile(), linked(2, 2)
    assert Profile.from_json(job.to_json()) == job
    assert type(there).from_json(there.to_json()) == there


def test_the_knee_and_the_turn_of_a_curve():
    assert find_knee([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], 0.5) == 4
    assert find_knee([1, 2, 3, 4], [1.0, 1.9, 2.1, 2.0], 0.5) == 2
    assert find_knee([1, 2, 4, 8], [1.0, 0.9, 0.8, 0.7], 0.5) == 1
    # Three workers divide the batch badly, four do not.
    assert find_knee([1, 2, 3, 4], [1.0, 1.9, 1.9, 3.6], 0.5) == 4


def test_a_curve_says_where_the_ideal_went():
    curve = scaling(Forecaster(profile((1.0,) * 4, 16, ()), linked(4, 1)))
    assert [p.workers for p in curve.points] == [1, 2, 3, 4]
    alone = curve.points[0]
    assert alone.speedup == 1.0
    assert not alone.eaten_s
    for point in curve.points[1:]:
        ideal_s = alone.forecast.step_s / point.workers
        assert sum(point.eaten_s.values()) == pytest.approx(point.forecast.step_s - ideal_s)
        assert point.efficiency == pytest.approx(point.speedup / point.workers)
    assert curve.turn in [p.workers for p in curve.points]


def test_words_for_what_limits_and_why_a_layout_lost():
    forecaster = Forecaster(profile((1.0,) * 4, 16, (2,)), linked(2, 1))
    alone, split, batch = (
        forecaster.forecast(layout) for layout in (Layout(), Layout(tp=2), Layout(dp_replicate=2))
    )
    assert limited_by(batch) == "exchange of gradients"
    assert limited_by(split) == "exchanges of tensor parallelism"
    text = why_it_lost(batch, alone)
    assert text.startswith("dp_replicate=2: ")
    assert "are exchange of gradients" in text
    assert text.endswith("more than in dp_replicate=1.")
    # A trial that has shown more than any term tells is the reason, and one that has shown less is none.
    for shown_s, reason in (
        (10.0, "when such layouts were timed it took 10 s more"),
        (-1e-3, "exchange of gradients"),
    ):
        terms = batch.terms.model_copy(update={"unexplained_s": shown_s})
        assert reason in why_it_lost(batch.model_copy(update={"terms": terms}), alone)


@pytest.mark.parametrize(("blocks", "batch", "hosts"), [(12, 64, 1), (96, 1024, 128)])
def test_large_searches_forecast_a_small_part_of_what_is_possible(blocks, batch, hosts):
    job = profile((0.5, *((1.0,) * (blocks - 2)), 2.0), batch, (2, 4, 8))
    found = search(Forecaster(job, linked(hosts, 8, worker_bytes=80 * GIB)))
    assert found.num_forecast < found.num_possible / 20
    assert len(found.fastest) == 10


def test_the_example_in_the_documentation_is_right():
    """docs/planning.md computes these numbers by hand."""
    layer = Block(
        name="layer",
        forward_s=Curve.line(0.0, 1e-3),
        backward_s=Curve.line(0.0, 2e-3),
        parameter_bytes=10_000_000,
        trained_bytes=10_000_000,
        output_bytes=1e6,
    )
    costs = Costs(
        threads=1,
        active=1,
        blocks=(layer,),
        row=(0,) * 4,
        optimizer_s_per_byte=1e-10,
        add_s_per_byte=5e-11,
        fixed_s=1e-4,
        meeting_s=1e-5,
    )
    job = Profile(job="example", batch_size=8, device="cpu", costs=(costs,), state_per_byte=2.0, base_bytes=0)
    forecaster = Forecaster(job, linked(1, 2))
    steps_ms = {
        text: 1e3 * forecaster.forecast(Layout.parse(text)).step_s
        for text in ("dp_replicate=1", "dp_replicate=2", "pp=2,micro=4")
    }
    assert steps_ms == pytest.approx(
        {"dp_replicate=1": 100.1, "dp_replicate=2": 53.12, "pp=2,micro=4": 63.74}
    )
    on_two_hosts = Forecaster(job, linked(2, 2)).forecast(Layout(dp_replicate=4))
    assert 1e3 * on_two_hosts.step_s == pytest.approx(337.33)
    terms = forecaster.forecast(Layout.parse("pp=2,micro=4")).terms
    assert terms.bubble_s == pytest.approx(12e-3)
    assert terms.messages_s == pytest.approx(1.64e-3)


def test_of_three_hosts_half_of_the_bytes_wait_for_the_end_of_the_backward_pass():
    job = profile((1.0,) * 4, 12, (), shares_update=True)
    terms = Forecaster(job, linked(3, 2)).forecast(Layout(dp_replicate=6)).terms
    # 160 MB, a worker's half of it; the cable carries both workers' four thirds of that; four messages.
    whole_s = 4 / 3 * 160e6 / 1.25e8 + 4e-4
    added_s = 160e6 * 5e-11 + 80e6 * 5e-11
    # Four blocks of 2 samples: three of them are backward while the first half of the bytes travels.
    hidden_s = 3 * (2e-4 + 2 * 2e-3)
    assert terms.gradients_s == pytest.approx(added_s + whole_s - hidden_s)


def test_batch_norm_counts_where_the_batch_is_split_and_more_over_a_cable():
    made = profile(tps=())
    (costs,) = made.costs
    blocks = tuple(
        b.model_copy(
            update={
                "forward_among_s": b.forward_s.scaled(1.2),
                "backward_among_s": b.backward_s.scaled(1.1),
                "statistics": (("all-gather", 1000.0), ("all-reduce", 500.0)),
            }
        )
        for b in costs.blocks
    )
    norms = made.model_copy(update={"costs": (costs.model_copy(update={"blocks": blocks}),)})
    layout = Layout.parse("dp_replicate=2")

    def compute_s(of, cluster, layout):
        return Forecaster(of, cluster).forecast(layout).terms.compute_s

    one = Layout()
    assert compute_s(norms, linked(), one) == compute_s(made, linked(), one)
    here = compute_s(norms, linked(), layout)
    assert 1.1 < here / compute_s(made, linked(), layout) < 1.2
    over_a_cable = compute_s(norms, linked(2, 1), layout)
    messages_s = CABLE.seconds("all-gather", 2, 2000) + CABLE.seconds("all-reduce", 2, 500)
    at_home_s = MEMORY.seconds("all-gather", 2, 2000) + MEMORY.seconds("all-reduce", 2, 500)
    assert over_a_cable - here == pytest.approx(len(costs.row) * (messages_s - at_home_s))
    # Hosts of one worker cannot measure it at home, and count the messages alone, in each micro-batch.
    without = tuple(b.model_copy(update={"forward_among_s": None, "backward_among_s": None}) for b in blocks)
    alone = made.model_copy(update={"costs": (costs.model_copy(update={"blocks": without}),)})
    assert compute_s(alone, linked(2, 1), one) == compute_s(made, linked(2, 1), one)
    for micro in (1, 2):
        split = Layout(dp_replicate=2, micro=micro)
        more_s = compute_s(alone, linked(2, 1), split) - compute_s(made, linked(2, 1), split)
        assert more_s == pytest.approx(micro * len(costs.row) * messages_s)
