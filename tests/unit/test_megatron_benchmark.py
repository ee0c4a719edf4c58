"""benchmarks/megatron.py and closed_form.py: the published table, and forms that can be computed by hand."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from planning_examples import CABLE, linked, profile

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import megatron
from closed_form import closed_form_s
from megatron_table import ROWS, check

from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.overlap import exposed_s
from paceline.records import Layout

FREE = Link(name="free", latency_s=0.0, bytes_per_s=1e15)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.billions)
def test_a_row_of_the_table_is_consistent(row):
    check(row)
    assert row.layout.workers == row.gpus


def test_stages_are_cut_as_megatron_cuts_them():
    """The same number of layers in each, with the head on top of the last."""
    share = megatron.Share(0.7, 300)
    for row in ROWS[4:]:
        forecaster = Forecaster(megatron.profile_of(row, share), megatron.cluster_of(row))
        stages = forecaster.stages_of(row.layout)
        assert {stage.num_blocks for stage in stages} == {row.layers // row.pp // row.chunks}


def test_forecasts_stay_as_near_as_they_were():
    """With the numbers that were fitted when the table in the documentation was made."""
    share = megatron.Share(0.717, 379)
    offs = {row.billions: megatron.planned_s(row, share) / row.step_s - 1 for row in ROWS}
    assert all(abs(offs[name]) < 0.002 for name in megatron.TUNING), offs
    assert max(map(abs, offs.values())) < 0.07, offs


def test_fitting_makes_the_tuning_rows_right():
    share = megatron.fitted_most(megatron.closed_s)
    first, second = (
        megatron.closed_s(row, share) / row.step_s for row in ROWS if row.billions in megatron.TUNING
    )
    assert first * second == pytest.approx(1.0)


def test_the_closed_form_is_the_forecast_where_there_is_nothing_to_simulate():
    job = profile((1.0,) * 4, 16, ())
    (costs,) = job.costs
    linear = [
        block.model_copy(update={n: getattr(block, n).model_copy(update={"points": ((0.0, 0.0), (1.0, s))})})
        for block in costs.blocks
        for n, s in (("forward_s", 1e-3), ("backward_s", 2e-3))
    ]
    both = linear[0].model_copy(update={"backward_s": linear[1].backward_s})
    bare = costs.model_copy(update={"blocks": (both,), "fixed_s": 0.0, "data_s": costs.data_s.scaled(0.0)})
    job = job.model_copy(update={"costs": (bare,)})
    alone = linked(1, 4, within=FREE)
    wanted = Forecaster(job, alone).forecast(Layout()).step_s
    assert closed_form_s(job, alone, Layout()) == pytest.approx(wanted)
    # Four equal blocks in two stages, messages that take no time: the bubble's closed form is exact.
    piped = Layout(pp=2, micro=4)
    wanted = Forecaster(job, alone).forecast(piped).step_s
    assert closed_form_s(job, alone, piped) == pytest.approx(wanted, rel=1e-6)
    # A ring over two hosts of one worker, latency apart, and what the backward pass hides of it.
    cable = CABLE.model_copy(update={"latency_s": 0.0})
    apart = linked(2, 1, within=FREE, between=cable)
    terms = Forecaster(job, apart).forecast(Layout(dp_replicate=2)).terms
    added_s = 2 * 4 * 4e7 * bare.add_s_per_byte
    ring_s = 4 * 4e7 / cable.bytes_per_s
    hidden_s = ring_s - exposed_s([(8 * 2e-3, 4e7)] * 4, 1 << 20, ring_s)
    assert hidden_s == pytest.approx(3 * 8 * 2e-3)
    closed_s = closed_form_s(job, apart, Layout(dp_replicate=2))
    assert closed_s == pytest.approx(terms.step_s - added_s + hidden_s)


def test_the_closed_form_does_not_guess_a_division():
    with pytest.raises(ValueError, match="not known for tp=4"):
        closed_form_s(profile(), linked(1, 4), Layout(tp=4))
