"""The timeline of a forecast step: it is the forecast, spread out in time."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from planning_examples import linked, profile, random_linked, random_profile

from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import Correction
from paceline.plan.schedules import SCHEDULES, make_schedule
from paceline.plan.search import layouts
from paceline.plan.spans import TERM_OF, StepTimeline, WorkerSpans, step_timeline
from paceline.plan.terms import Terms
from paceline.records import Layout


def by_term(worker: WorkerSpans) -> dict[str, float]:
    found = dict.fromkeys(Terms.model_fields, 0.0)
    for kind, seconds in worker.seconds().items():
        term = TERM_OF[kind]
        if term is not None:
            found[term] += seconds
    return found


@st.composite
def cases(draw):
    """A random job and cluster, and a few of all layouts that it can have there, recomputation included."""
    drawn = random.Random(draw(st.integers(0, 2**32)))
    more = {
        "corrections": tuple(
            Correction(
                ways=ways,
                workers=drawn.choice((None, 2, 4)),
                over_network=drawn.random() < 0.5,
                step_s=drawn.uniform(-3e-3, 3e-3),
                micro_s=drawn.uniform(-1e-3, 1e-3),
                action_s=drawn.choice((0.0, 2e-3)) if ways == ("pipeline",) else 0.0,
            )
            for ways in (("data",), ("sharded",), ("gathered",), ("pipeline",), ("data", "pipeline"))
        ),
    }
    job = random_profile(drawn).model_copy(update=more)
    forecaster = Forecaster(job, random_linked(drawn))
    every = list(layouts(forecaster))
    return forecaster, drawn.sample(every, min(6, len(every)))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_spans_follow_each_other_and_end_with_the_forecast(case):
    forecaster, some = case
    for layout in some:
        forecast, timeline = forecaster.forecast(layout), step_timeline(forecaster, layout)
        assert timeline.step_s == forecast.step_s
        assert [rank for worker in timeline.workers for rank in worker.ranks] == list(range(layout.workers))
        for worker in timeline.workers:
            assert worker.spans[0].begin_s == 0.0
            assert worker.spans[-1].end_s == forecast.step_s
            assert all(a.end_s == b.begin_s for a, b in itertools.pairwise(worker.spans)), layout
            assert all(span.seconds > 0 for span in worker.spans), layout


@settings(max_examples=60, deadline=None, derandomize=True)
@given(cases())
def test_the_busiest_workers_spans_add_up_to_the_terms(case):
    forecaster, some = case
    for layout in some:
        forecast, timeline = forecaster.forecast(layout), step_timeline(forecaster, layout)
        # Where the terms are too much, the whole is drawn shorter.
        less = min(0.0, forecast.terms.unexplained_s)
        scale = forecast.step_s / (forecast.step_s - less)
        terms = {name: seconds * scale for name, seconds in forecast.terms.model_dump().items()}
        terms["unexplained_s"] = max(0.0, forecast.terms.unexplained_s)
        busiest = by_term(timeline.workers[timeline.busiest])
        for name in (
            "data_s",
            "compute_s",
            "tensor_s",
            "overhead_s",
            "bubble_s",
            "messages_s",
            "unexplained_s",
        ):
            assert busiest[name] == pytest.approx(terms[name], rel=1e-9, abs=1e-12), (layout, name)
        # The update is that of who takes longest for it, which may be another worker.
        last = [by_term(worker) for worker in timeline.workers if "wait" not in worker.seconds()]
        for name in ("gather_s", "gradients_s", "optimizer_s", "fixed_s"):
            assert any(found[name] == pytest.approx(terms[name], rel=1e-9, abs=1e-12) for found in last), name
        # Sending delays all workers alike by the end, and none computes longer.
        for worker in map(by_term, timeline.workers):
            assert worker["messages_s"] == pytest.approx(terms["messages_s"], abs=1e-12)
            worked_s = sum(worker[name] for name in ("compute_s", "tensor_s", "overhead_s"))
            most_s = sum(busiest[name] for name in ("compute_s", "tensor_s", "overhead_s"))
            assert worked_s <= most_s * (1 + 1e-9)


def passes(timeline: StepTimeline, kinds: tuple[str, ...]) -> dict[tuple[int, int], tuple[float, float, int]]:
    """When each stage and micro-batch begins and ends, and on which worker."""
    found: dict[tuple[int, int], tuple[float, float, int]] = {}
    for at, worker in enumerate(timeline.workers):
        for span in worker.spans:
            if span.kind in kinds:
                assert span.stage is not None
                assert span.micro is not None
                assert (span.stage, span.micro) not in found
                found[span.stage, span.micro] = span.begin_s, span.end_s, at
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_pipeline_shows_its_real_schedule(name, recompute):
    if name.startswith("zb") and recompute != "none":
        recompute = "selective"
    forecaster = Forecaster(profile((0.5, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 2.0), 24, ()), linked(4, 2))
    layout = Layout(pp=4, dp_replicate=2, micro=6, schedule=name, recompute=recompute)
    timeline = step_timeline(forecaster, layout)
    schedule = make_schedule(name, 4, 6)
    sending = forecaster.parts(layout).sending
    sends_s = [hop.there_s for hop in sending.hops]
    assert max(sends_s) > 1e-4
    forward, backward = passes(timeline, ("forward",)), passes(timeline, ("backward",))
    wanted = {(stage, micro) for stage in range(schedule.num_stages) for micro in range(6)}
    assert forward.keys() == backward.keys() == wanted
    assert (passes(timeline, ("weights",)).keys() == wanted) == schedule.in_parts
    for (stage, micro), (begin_s, _, at) in forward.items():
        assert at == schedule.worker_of(stage)
        if stage:
            _, end_s, before = forward[stage - 1, micro]
            assert begin_s >= end_s + sends_s[stage - 1] * (at != before) - 1e-12
    for (stage, micro), (begin_s, _, at) in backward.items():
        assert begin_s >= forward[stage, micro][1] - 1e-12
        if stage < schedule.num_stages - 1:
            _, end_s, after = backward[stage + 1, micro]
            assert begin_s >= end_s + sends_s[stage] * (at != after) - 1e-12
    for at, worker in enumerate(timeline.workers):
        order = [(a.kind, a.stage, a.micro) for a in schedule.actions(at)]
        shown = [
            ({"forward": "F", "backward": "I" if schedule.in_parts else "B", "weights": "W"}[s.kind], s.stage, s.micro)
            for s in worker.spans
            if s.kind in ("forward", "backward", "weights")
        ]  # fmt: skip
        assert shown == order


def test_even_stages_wait_as_long_as_the_closed_form_says():
    """(p-1)/m of the work, for every worker (Narayanan et al. 2021)."""
    free = Link(name="free", latency_s=0.0, bytes_per_s=1e30)
    forecaster = Forecaster(profile((1.0,) * 8, 32, ()), linked(within=free))
    timeline = step_timeline(forecaster, Layout(pp=4, micro=8))
    for worker in timeline.workers:
        terms = by_term(worker)
        assert terms["bubble_s"] == pytest.approx(terms["compute_s"] * 3 / 8)
        assert "message" not in worker.seconds()
    # The first has nothing to wait for until its first gradients come, the last begins last.
    first, last = timeline.workers[0], timeline.workers[-1]
    assert [span.kind for span in first.spans[:6]] == ["data", *["forward"] * 4, "bubble"]
    assert [span.kind for span in last.spans[:2]] == ["data", "bubble"]


def kinds_of(layout: Layout) -> list[str]:
    forecaster = Forecaster(profile((1.0,) * 3, 16, (2,), shares_update=False), linked(1, 4))
    (worker,) = step_timeline(forecaster, layout).workers
    return [span.kind for span in worker.spans]


@pytest.mark.parametrize(
    ("layout", "kinds"),
    [
        (Layout(), "data forward backward optimizer fixed"),
        (Layout(dp_replicate=2), "data forward backward gradients optimizer fixed"),
        (Layout(recompute="full"), "data forward recompute backward optimizer fixed"),
        (Layout(tp=2), "data forward tensor backward tensor optimizer fixed"),
        (
            Layout(dp_shard=4, zero=3, micro=2),
            "data" + 2 * " gather forward gather backward gradients" + " optimizer fixed",
        ),
        (Layout(dp_shard=4, zero=2), "data gather forward backward gradients optimizer fixed"),
        (Layout(dp_shard=4, zero=1), "data forward backward gradients optimizer gather fixed"),
        (
            Layout(dp_shard=2, dp_replicate=2, zero=2, micro=2),
            "data gather" + 2 * " forward backward gradients" + " gradients optimizer fixed",
        ),
        (
            Layout(dp_shard=2, dp_replicate=2, zero=1, micro=2),
            "data" + 2 * " forward backward" + " gradients optimizer gather fixed",
        ),
    ],
)
def test_workers_with_all_blocks_do_one_thing_after_the_other(layout, kinds):
    assert kinds_of(layout) == kinds.split()


def test_a_timeline_goes_to_json_and_back():
    forecaster = Forecaster(profile(), linked(2, 2))
    timeline = step_timeline(forecaster, Layout(pp=2, dp_replicate=2, micro=4))
    assert StepTimeline.from_json(timeline.to_json()) == timeline
