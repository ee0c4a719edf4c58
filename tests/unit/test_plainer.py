"""Which of several layouts that are level is chosen."""

from __future__ import annotations

import pytest
from planning_examples import linked, profile

from paceline.plan import search as search_module
from paceline.plan.corrections import corrected
from paceline.plan.curves import Curve
from paceline.plan.explain import why_it_lost
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Tried
from paceline.plan.search import search
from paceline.plan.terms import Forecast
from paceline.records import Layout

ALONE, DATA = "threads=1", "dp_replicate=2,threads=1"
SHARDED, GATHERED = "dp_shard=2,zero=1,threads=1", "dp_shard=2,zero=3,threads=1"
PIPELINE, SPLIT = "pp=2,micro=2,threads=1", "pp=2,micro=2,schedule=zb-h1,threads=1"
SLOW_S, FAST_S = 1.0, 0.01


def forecaster(takes_s: dict[str, float]) -> Forecaster:
    """Two workers, with what was tried; whatever is not told is slow."""
    made, cluster = profile(tps=()), linked(2, 1)
    every = [ALONE, DATA, SHARDED, GATHERED, PIPELINE, SPLIT]
    every += [f"{x},micro=2" for x in every[:4]] + [x.replace("micro=2", "micro=8") for x in every[4:]]
    tried = [Tried(layout=Layout.parse(text), step_s=takes_s.get(text, SLOW_S)) for text in every]
    return Forecaster(corrected(made, cluster, tried), cluster)


@pytest.mark.parametrize(
    ("fastest", "plainer"),
    [
        (GATHERED, SHARDED),
        (GATHERED, DATA),
        (SHARDED, DATA),
        (SPLIT, DATA),
        (SPLIT, ALONE),
        (PIPELINE, ALONE),
    ],
)
@pytest.mark.parametrize("workers", [None, 2])
def test_what_is_plainer_is_taken_while_it_is_level(fastest, plainer, workers):
    for slower, taken in ((1.02, plainer), (1.04, fastest)):
        told = forecaster({fastest: FAST_S, plainer: FAST_S * slower})
        found = search(told, number=3, workers=workers).fastest
        if workers is not None and plainer == ALONE:
            taken = fastest
        assert str(found[0].layout) == str(Layout.parse(taken))
        # The others stay where they were.
        assert str(found[taken == plainer].layout) == str(Layout.parse(fastest))


def test_what_was_a_little_faster_is_told_of():
    plain, sharded = search(forecaster({SHARDED: FAST_S, DATA: FAST_S * 1.02}), number=2).fastest
    assert sharded.step_s < plain.step_s
    told = why_it_lost(sharded, plain)
    assert told.startswith(str(sharded.layout))
    assert "by too little to tell" in told


def test_of_layouts_that_are_as_plain_the_fastest_is_taken():
    told = forecaster({SPLIT: FAST_S, DATA: FAST_S * 1.02, ALONE: FAST_S * 1.01})
    assert search(told).fastest[0].layout == Layout.parse(ALONE)
    told = forecaster({SPLIT: FAST_S, DATA: FAST_S * 1.01, ALONE: FAST_S * 1.02})
    assert search(told).fastest[0].layout == Layout.parse(DATA)


def test_data_parallelism_need_save_nothing_over_one_process():
    """That is for the trial to say, which compares them round by round (`choose`)."""
    assert search(forecaster({DATA: FAST_S, ALONE: FAST_S * 1.01})).fastest[0].layout == Layout.parse(DATA)


def test_what_does_not_fit_is_not_taken_for_being_plain():
    told = forecaster({GATHERED: FAST_S, DATA: FAST_S * 1.01})
    room = told.forecast(Layout.parse(GATHERED)).memory.own
    assert room < told.forecast(Layout.parse(DATA)).memory.own
    assert search(told, memory_bytes=room, margin=0.0).fastest[0].layout == Layout.parse(GATHERED)


def test_where_nothing_was_tried_the_fastest_is_taken(monkeypatch):
    monkeypatch.setattr(search_module, "_LEVEL", 1.0)
    told = forecaster({SHARDED: FAST_S, DATA: FAST_S * 1.9})
    assert search(told).fastest[0].layout == Layout.parse(DATA)
    bare = Forecaster(told.profile.model_copy(update={"tried": ()}), told.linked)
    found = search(bare).fastest
    assert found[0].layout.splits_model
    assert found[0].step_s == min(forecast.step_s for forecast in found)


@pytest.mark.parametrize("text", [ALONE, DATA])
def test_without_a_pipeline_more_micro_batches_are_no_faster_than_fewer_that_were_tried(text):
    """Small batches of blocks measured by themselves take less a sample here; whether four save more than two did, who
    knows."""
    made, cluster = profile((1.0,) * 4, tps=()), linked(1, 2)
    curve = Curve.of({2: 1.8e-3, 4: 4e-3, 8: 9e-3, 16: 20e-3})
    (costs,) = made.costs
    slow = {"forward_s": curve, "backward_s": curve.scaled(2.0)}
    blocks = tuple(block.model_copy(update=slow) for block in costs.blocks)
    made = made.model_copy(update={"costs": (costs.model_copy(update={"blocks": blocks}),)})
    one, two, four = (Layout.parse(f"{text},micro={micro}") for micro in (1, 2, 4))
    bare = Forecaster(made, cluster)
    once_s, twice_s, often_s = (bare.forecast(layout).step_s for layout in (one, two, four))
    assert often_s < 0.95 * twice_s < twice_s < once_s
    tried = [Tried(layout=one, step_s=once_s), Tried(layout=two, step_s=twice_s)]
    told = Forecaster(corrected(made, cluster, tried), cluster).forecast(four)
    assert told.step_s == pytest.approx(twice_s)
    assert sum(told.terms.to_json().values()) == pytest.approx(twice_s)


@pytest.mark.parametrize(("share", "is_taken"), [(0.9, True), (0.96, True), (0.98, False), (1.02, False)])
@pytest.mark.parametrize("workers", [None, 2])
def test_what_was_tried_is_taken_before_what_was_not_while_it_is_level(monkeypatch, share, is_taken, workers):
    told = forecaster(dict.fromkeys((PIPELINE, SPLIT), 0.1))
    between = Layout.parse(PIPELINE.replace("micro=2", "micro=4"))
    itself = told.forecast

    def forecast(layout: Layout, **how: bool) -> Forecast:
        found = itself(layout, **how)
        if layout != between:
            return found
        more_s = found.terms.unexplained_s + 0.1 * share - found.step_s
        return found.model_copy(update={"terms": found.terms.model_copy(update={"unexplained_s": more_s})})

    monkeypatch.setattr(told, "forecast", forecast)
    for bound in ("floor_s", "least_s"):
        monkeypatch.setattr(told, bound, lambda layout: 0.0)
    first = search(told, number=1, workers=workers).fastest[0].layout
    assert (first == between) == is_taken
    assert is_taken or first in {Layout.parse(PIPELINE), Layout.parse(SPLIT)}
