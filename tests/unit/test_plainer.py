"""Which of several layouts that are level is chosen."""

from __future__ import annotations

import pytest
from planning_examples import linked, profile

from paceline.plan import search as search_module
from paceline.plan.corrections import corrected
from paceline.plan.explain import why_it_lost
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Tried
from paceline.plan.search import search
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
