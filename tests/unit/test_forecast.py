"""The planner's arithmetic, against forms that can be computed by hand."""

from __future__ import annotations

import random

import pytest
from planning_examples import CABLE, GIB, MEMORY, linked, profile

from paceline.errors import LayoutError
from paceline.plan.curves import Curve
from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import Block, Costs, Profile
from paceline.plan.schedules import SCHEDULES, make_schedule
from paceline.plan.search import layouts
from paceline.plan.terms import Memory
from paceline.plan.timeline import Hop, coded, makespan_s, simulate
from paceline.records import Layout

SEEDS = range(25)


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


def test_batch_norm_is_given_two_samples_at_least():
    made = profile(tps=())
    (costs,) = made.costs
    blocks = tuple(b.model_copy(update={"statistics": (("all-gather", 1000.0),)}) for b in costs.blocks)
    norms = made.model_copy(update={"costs": (costs.model_copy(update={"blocks": blocks}),)})
    of_one = Layout(pp=2, micro=made.batch_size)
    assert Forecaster(made, linked()).forecast(of_one).step_s > 0
    forecaster = Forecaster(norms, linked())
    with pytest.raises(LayoutError, match="batch norm"):
        forecaster.forecast(of_one)
    assert forecaster.forecast(Layout(pp=2, micro=made.batch_size // 2)).step_s > 0
    assert max(layout.micro for layout in layouts(forecaster)) == made.batch_size // 2


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
