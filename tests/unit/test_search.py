"""Bounds, searches and curves over all layouts of drawn jobs, against looking at everything."""

from __future__ import annotations

import random

import pytest
from planning_examples import GIB, linked, profile, random_linked, random_profile, random_tried

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.room import room_bytes
from paceline.plan.scaling import find_knee, scaling
from paceline.plan.search import layouts, search
from paceline.plan.terms import Forecast, Memory, Terms
from paceline.records import Layout

SEEDS = range(25)


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


@pytest.mark.parametrize(("blocks", "batch", "hosts"), [(12, 64, 1), (96, 1024, 128)])
def test_large_searches_forecast_a_small_part_of_what_is_possible(blocks, batch, hosts):
    job = profile((0.5, *((1.0,) * (blocks - 2)), 2.0), batch, (2, 4, 8))
    found = search(Forecaster(job, linked(hosts, 8, worker_bytes=80 * GIB)))
    assert found.num_forecast < found.num_possible / 20
    assert len(found.fastest) == 10
