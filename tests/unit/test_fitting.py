"""Which layouts can be timed in the memory that there is, and which of them by turns."""

from __future__ import annotations

from planning_examples import linked, profile

from paceline.launch.choosing import Choosing
from paceline.launch.spec import RunSpec
from paceline.plan.choose import JobForecasts
from paceline.plan.fitting import by_turns, why_not
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Profile
from paceline.plan.room import memory_margin
from paceline.records import Layout

MIB = 1 << 20
MARGIN = memory_margin(linked())
ONE, DATA, SHARDED, PIPELINE = (
    Layout.parse(text)
    for text in (
        "dp_replicate=1,threads=1",
        "dp_replicate=2,threads=1",
        "dp_shard=2,zero=3,threads=1",
        "pp=2,micro=2,threads=1",
    )
)


def job(base_bytes: int = 100 * MIB) -> Profile:
    return profile(shares_update=False).model_copy(update={"base_bytes": base_bytes})


def own_bytes(layout: Layout) -> int:
    return Forecaster(job(), linked(per_host=2)).forecast(layout).memory.own


def with_room(num_bytes: float) -> Forecaster:
    """So much for each of two workers of a host, once a share is left free."""
    return Forecaster(job(), linked(per_host=2, worker_bytes=round(num_bytes / (1 - MARGIN)) + 1))


def test_a_layout_needs_room_beside_the_workers_that_wait():
    needed = own_bytes(DATA)
    assert why_not(with_room(needed), DATA) == ""
    told = why_not(with_room(needed * 0.99), DATA)
    assert told.startswith(f"dp_replicate=2,threads=1 needs {needed / MIB:,.0f} MiB a worker, and there are ")
    assert f"({MARGIN:.0%} left free)" in told
    # One process has all of its host, less the base of the worker that waits.
    alone = own_bytes(ONE)
    assert why_not(with_room((alone + 100 * MIB) / 2 + 1), ONE) == ""
    assert why_not(with_room((alone + 90 * MIB) / 2), ONE) != ""


def test_who_has_measured_has_what_splits_models_in_memory():
    """Also where a layout does without it, and while a worker waits."""
    needed = own_bytes(DATA)
    room = Forecaster(job(), with_room(needed + 30 * MIB).linked)
    for splitting, layout, fits in ((30, DATA, True), (31, DATA, False), (30, SHARDED, True)):
        loaded = room.profile.model_copy(update={"splitting_bytes": splitting * MIB})
        own = Forecaster(loaded, room.linked).forecast(layout).memory.own
        there = linked(
            per_host=2,
            worker_bytes=round(max(needed + 30 * MIB, own * (layout == SHARDED)) / (1 - MARGIN)) + 1,
        )
        assert (why_not(Forecaster(loaded, there), layout) == "") == fits
    alone = own_bytes(ONE)
    loaded = job().model_copy(update={"splitting_bytes": 30 * MIB})
    for more, fits in ((160, True), (150, False)):
        there = linked(per_host=2, worker_bytes=round((alone + more * MIB) / 2 / (1 - MARGIN)) + 1)
        assert (why_not(Forecaster(loaded, there), ONE) == "") == fits


def test_models_that_do_not_fit_together_are_timed_one_after_the_other():
    every = [ONE, DATA, SHARDED, PIPELINE]
    assert by_turns(with_room(20 * own_bytes(DATA)), every) == [every]
    largest = max(map(own_bytes, every))
    assert by_turns(with_room(largest), every) == [[layout] for layout in every]
    assert by_turns(with_room(largest), []) == []
    # What differs in its threads alone has one model.
    threads = [ONE, ONE.model_copy(update={"threads": 2})]
    assert by_turns(with_room(own_bytes(ONE)), threads) == [threads]


def test_all_models_of_a_group_have_room_with_the_base_once():
    forecaster = with_room(own_bytes(SHARDED) + own_bytes(PIPELINE) - 100 * MIB)
    assert by_turns(forecaster, [SHARDED, PIPELINE]) == [[SHARDED, PIPELINE]]
    less = with_room(own_bytes(SHARDED) + own_bytes(PIPELINE) - 101 * MIB)
    assert by_turns(less, [SHARDED, PIPELINE]) == [[SHARDED], [PIPELINE]]


def test_single_processes_and_plain_data_parallelism_are_timed_where_they_fit():
    def shortlist_in(worker_bytes: int) -> list[Layout]:
        there = linked(per_host=2, worker_bytes=worker_bytes)
        choosing = Choosing.__new__(Choosing)
        choosing._spec = RunSpec(job_file="", out="")
        choosing._always = [ONE, DATA]
        choosing._planned = JobForecasts(job(), there)
        return choosing.shortlist()

    assert {ONE, DATA} <= set(shortlist_in(100 * own_bytes(DATA)))
    found = shortlist_in(round((own_bytes(PIPELINE) + 100 * MIB) / (1 - MARGIN)))
    assert found
    assert DATA not in found
    assert all(layout.splits_model for layout in found if layout.workers > 1)
