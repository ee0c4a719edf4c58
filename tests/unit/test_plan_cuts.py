"""Where pipelines are cut into stages."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence

import pytest
from planning_examples import CABLE, MEMORY, linked, profile, sending

from paceline.errors import LayoutError
from paceline.plan.cuts import partition
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Correction, Tried
from paceline.plan.search import layouts
from paceline.records import Layout

SEEDS = range(25)


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
