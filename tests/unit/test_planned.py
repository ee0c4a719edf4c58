"""What eats the ideal, and the advice: against what is forecast when something is changed."""

from __future__ import annotations

import random

import pytest
from planning_examples import CABLE, GIB, MEMORY, linked, profile, random_linked, random_profile

from paceline.errors import LayoutError
from paceline.plan.advice import Advice
from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.losses import CAUSES, losses
from paceline.plan.planned import Planned, planned
from paceline.plan.profile import Block, Costs, LinkedCluster, Profile
from paceline.plan.scaling import scaling
from paceline.plan.search import search


def plan_of(job: Profile, there: LinkedCluster, **how: int) -> Planned:
    forecaster = Forecaster(job, there)
    found = search(forecaster, number=4, **how)
    return planned(forecaster, found, scaling(forecaster, **how), **how)


@pytest.mark.parametrize("seed", range(20))
def test_what_is_lost_and_the_efficiency_are_all_of_the_time(seed):
    drawn = random.Random(seed)
    forecaster = Forecaster(random_profile(drawn), random_linked(drawn))
    curve = scaling(forecaster, memory_bytes=64 * GIB)
    lost = losses(forecaster, curve)
    assert lost[0] == dict.fromkeys(CAUSES, 0.0)
    for point, causes in zip(curve.points, lost, strict=True):
        assert tuple(causes) == CAUSES
        assert all(share >= 0 for share in causes.values())
        assert point.efficiency + sum(causes.values()) == pytest.approx(max(1.0, point.efficiency))


def test_uneven_stages_are_told():
    # Four blocks on three workers of a pipeline: one has two of them, the average 4/3.
    told = plan_of(profile((1.0,) * 4, 1, ()), linked(1, 3))
    point, lost = told.curve.points[-1], told.losses[-1]
    assert point.forecast.layout.pp == 3
    assert lost["uneven stages"] == pytest.approx(point.forecast.terms.compute_s / 3 / point.forecast.step_s)


def test_communication_is_told():
    told = plan_of(profile((1.0,), 8, ()), linked(2, 1))
    point, lost = told.curve.points[-1], told.losses[-1]
    terms = point.forecast.terms
    assert point.forecast.layout.data_parallel == 2
    assert lost["communication"] == pytest.approx((terms.gather_s + terms.gradients_s) / terms.step_s)
    assert lost["bubbles"] == lost["uneven stages"] == 0.0


def test_small_batches_are_told():
    """A pass of any micro-batch takes 1 ms, whatever is in it, and 2 ms backward: eight workers gain nothing by it."""
    block = Block(name="block", forward_s=Curve.line(1e-3, 1e-4), backward_s=Curve.line(2e-3, 2e-4))
    costs = Costs(threads=1, active=1, blocks=(block,), optimizer_s_per_byte=0.0)
    job = Profile(job="a", batch_size=8, device="cpu", costs=(costs,), state_per_byte=2.0, base_bytes=0)
    forecaster = Forecaster(job, linked(1, 8))
    curve = scaling(forecaster, workers=[1, 8])
    # 3 ms + 8 · 0.3 ms alone; 3.3 ms in each of eight workers, who would take 0.675 ms if nothing were lost.
    assert [point.forecast.step_s for point in curve.points] == pytest.approx([5.4e-3, 3.3e-3])
    lost = losses(forecaster, curve)[-1]
    assert lost["small batches"] == pytest.approx((3.3 - 0.675) / 3.3)
    assert sum(lost.values()) == pytest.approx(lost["small batches"])


def test_what_takes_less_than_its_share_is_taken_off_the_others():
    forecaster = Forecaster(profile((1.0,), 8, ()), linked(1, 2))
    curve = scaling(forecaster)
    step_s = curve.points[1].forecast.step_s

    def lost(**eaten: float) -> dict[str, float]:
        eaten_s = {f"{term}_s": share * step_s for term, share in eaten.items()}
        point = curve.points[1].model_copy(update={"eaten_s": eaten_s})
        return losses(forecaster, curve.model_copy(update={"points": (curve.points[0], point)}))[1]

    found = lost(gradients=0.3, fixed=0.1, optimizer=-0.2, messages=0.1)
    assert found["communication"] == pytest.approx(0.3)
    assert found["fixed costs"] == 0.0
    found = lost(gradients=0.3, bubble=0.1, optimizer=-0.2)
    assert found["communication"] == pytest.approx(0.15)
    assert found["bubbles"] == pytest.approx(0.05)
    # Better than ideal: nothing is lost.
    assert lost(gradients=0.1, compute=-0.2) == dict.fromkeys(CAUSES, 0.0)


def test_advice_is_what_a_forecast_with_the_change_says():
    told = plan_of(profile((1.0,) * 4, 16, (2,)), linked(4, 2))
    best = told.found.fastest[0]
    job, there = profile((1.0,) * 4, 32, (2,)), linked(4, 2)
    (larger,) = search(Forecaster(job, there), number=1).fastest
    batch = next(change for change in told.advice.changes if change.what.startswith("a batch of 32"))
    assert batch.factor == pytest.approx(larger.samples_per_s / best.samples_per_s)
    assert batch.layout == larger.layout
    faster = CABLE.model_copy(update={"latency_s": CABLE.latency_s / 2, "bytes_per_s": CABLE.bytes_per_s * 2})
    (linked_better,) = search(
        Forecaster(profile((1.0,) * 4, 16, (2,)), linked(4, 2, between=faster)), number=1
    ).fastest
    cable = next(change for change in told.advice.changes if "between hosts (gloo)" in change.what)
    assert cable.factor == pytest.approx(linked_better.samples_per_s / best.samples_per_s)
    factors = [change.factor for change in told.advice.changes]
    assert factors == sorted(factors, reverse=True)
    useful = next(change for change in told.advice.changes if "processors" not in change.what)
    assert f"What would help most: {useful.what}, {useful.factor:.2f}×" in told.advice.sentences[-1]
    assert Advice.from_json(told.advice.to_json()) == told.advice


def test_advice_on_unequal_links_makes_all_of_them_faster():
    slow = CABLE.model_copy(update={"name": "wifi", "bytes_per_s": 5e7})
    there = linked(2, 2).model_copy(update={"between_of": (CABLE, slow), "within_of": (MEMORY, CABLE)})
    job = profile((1.0,) * 4, 16, (2,))
    told = plan_of(job, there)

    def twice(link: Link) -> Link:
        return link.model_copy(update={"latency_s": link.latency_s / 2, "bytes_per_s": 2 * link.bytes_per_s})

    for what, changed in (
        ("a link between hosts (gloo, wifi) twice as fast", {"between_of": (twice(CABLE), twice(slow))}),
        (
            "exchanges within a host (shared memory, gloo) twice as fast",
            {"within_of": (twice(MEMORY), twice(CABLE))},
        ),
        (
            "twice as many hosts",
            {
                "cluster": linked(4, 2).cluster,
                "between_of": (CABLE, slow) * 2,
                "within_of": (MEMORY, CABLE) * 2,
            },
        ),
    ):
        (then,) = search(Forecaster(job, there.model_copy(update=changed)), number=1).fastest
        (change,) = [change for change in told.advice.changes if change.what == what]
        assert change.factor == pytest.approx(then.samples_per_s / told.found.fastest[0].samples_per_s), what


def test_advice_says_how_many_workers_to_take():
    # Little to compute and much to exchange: one worker alone is fastest.
    slow = CABLE.model_copy(update={"bytes_per_s": 1e6})
    told = plan_of(profile((1.0,) * 2, 4, ()), linked(4, 1, between=slow))
    assert told.found.fastest[0].layout.workers < 4
    used = told.found.fastest[0].layout.workers
    assert f": {used} of 4 workers," in told.advice.sentences[0]
    assert told.advice.sentences[0].endswith("more workers would be slower.")
    # One block and a batch of two: a third worker would have nothing to do.
    few = plan_of(profile((1.0,), 2, ()), linked(1, 4))
    assert few.advice.sentences[0].startswith("Train with dp_replicate=2,threads=1: 2 of 4 workers,")
    assert few.advice.sentences[0].endswith("; no layout that fits uses more.")


def test_memory_is_advised_where_something_was_refused_for_it():
    job, there = profile((1.0,) * 4, 16, ()), linked(1, 2)
    roomy = plan_of(job, there)
    assert not any("memory" in c.what and "shared" not in c.what for c in roomy.advice.changes)
    tight = plan_of(job, there, memory_bytes=int(0.7 * GIB))
    (more,) = [change for change in tight.advice.changes if change.what == "twice the memory"]
    (then,) = search(Forecaster(job, there), number=1, memory_bytes=int(1.4 * GIB)).fastest
    assert more.factor == pytest.approx(then.samples_per_s / tight.found.fastest[0].samples_per_s)


def test_the_record_for_programs_holds_all_of_it():
    told = plan_of(profile((1.0,) * 4, 8, ()), linked(1, 2))
    data = told.to_json()
    assert set(data) == {"layouts", "curve", "losses", "timeline", "advice"}
    assert [row["workers"] for row in data["losses"]] == [
        point["workers"] for point in data["curve"]["points"]
    ]
    assert data["timeline"]["layout"] == data["layouts"][0]["layout"]
    assert data["timeline"]["step_s"] == pytest.approx(sum(data["layouts"][0]["terms"].values()))


def test_a_number_of_workers_that_no_layout_has_is_said():
    forecaster = Forecaster(profile((1.0,) * 2, 4, ()), linked(1, 32))
    with pytest.raises(
        LayoutError, match="no layout has 13 workers: the batch of 4 samples and the 2 blocks"
    ):
        search(forecaster, workers=13)
