"""Time and cost to a target, against closed forms and against trying everything."""

from __future__ import annotations

import io
import math
import random
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from planning_examples import GIB, linked, profile, random_linked, random_profile
from rich.console import Console

from paceline.cli import _one_noise
from paceline.errors import LayoutError, OptionError
from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.goal import GoalCurve, samples_needed, steps_needed, time_to_goal
from paceline.plan.profile import Profile
from paceline.plan.room import room_bytes
from paceline.plan.search import layouts
from paceline.report.goal_figures import drawing
from paceline.report.goal_page import goal_section
from paceline.report.goals import goal_lines, print_goal
from paceline.report.theme import Size

positive = st.floats(0.1, 1e6)


@given(positive, positive)
def test_steps_and_samples_trade_off_as_in_the_paper(batch, noise):
    steps, samples = steps_needed(batch, noise), samples_needed(batch, noise)
    assert (steps - 1) * (samples - 1) == pytest.approx(1.0)
    # E = B S, with E_min = N S_min.
    assert noise * samples == pytest.approx(batch * steps)
    assert steps_needed(noise, noise) == samples_needed(noise, noise) == 2.0


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(1, 1000))
@example(204, 1.0)  # a pipeline that fits only as it is not fastest
def test_it_finds_what_trying_every_layout_of_every_batch_size_finds(seed, noise):
    drawn = random.Random(seed)
    job, cluster = random_profile(drawn), random_linked(drawn)
    numbers = range(1, cluster.cluster.workers + 1)
    sizes = [job.batch_size // 2, job.batch_size, job.batch_size * 2]
    least: dict[tuple[int, int], float] = {}
    for size in sizes:
        forecaster = Forecaster(job.model_copy(update={"batch_size": size}), cluster)
        for number in numbers:
            for layout in layouts(forecaster, number):
                found = forecaster.forecast(layout)
                if forecaster.needed_bytes(layout) <= room_bytes(cluster, layout):
                    time = found.step_s * (1 + noise / size)
                    least[number, size] = min(time, least.get((number, size), math.inf))
    if not least:
        with pytest.raises(LayoutError, match="no layout"):
            time_to_goal(job, cluster, noise, batch_sizes=sizes)
        return
    curve = time_to_goal(job, cluster, noise, batch_sizes=sizes)
    found_at = {(p.workers, c.forecast.samples): c.time for p in curve.points for c in p.choices}
    assert found_at.keys() == least.keys()
    fewest = curve.points[0].workers
    unit_s = least.get((fewest, job.batch_size), least[fewest, curve.points[0].choices[0].forecast.samples])
    for place, time in found_at.items():
        assert time * unit_s == pytest.approx(least[place])
    for point in curve.points:
        assert point.best.time == min(choice.time for choice in point.choices)
        assert point.cost == pytest.approx(point.best.time * point.workers / fewest)
    assert curve.at(curve.fastest).best.time == min(point.best.time for point in curve.points)
    assert curve.at(curve.cheapest).cost == min(point.cost for point in curve.points)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 10_000), st.floats(1, 1e5), st.floats(1.0, 100.0))
def test_more_noise_never_asks_for_less_throughput(seed, noise, factor):
    """With more noise samples count for more, and steps for less."""
    drawn = random.Random(seed)
    job, cluster = random_profile(drawn), linked(1, drawn.choice((1, 2, 4)))
    sizes = [job.batch_size // 2, *(job.batch_size * 2**n for n in range(5))]
    less, more = (time_to_goal(job, cluster, scale, batch_sizes=sizes) for scale in (noise, noise * factor))
    for a, b in zip(less.points, more.points, strict=True):
        assert b.best.forecast.samples_per_s >= a.best.forecast.samples_per_s * (1 - 1e-9)


def test_one_worker_by_hand():
    """A step takes 10 ms and 1 ms a sample: (10 + B)(1 + N/B) is least at B = √(10 N)."""
    job = one_block(Curve.line(4e-3, 0.4e-3), Curve.line(6e-3, 0.6e-3), batch_size=5)
    curve = time_to_goal(job, linked(1, 1), 90.0, price_per_worker_hour=3.6, batch_sizes=[10, 20, 30, 40, 60])
    (point,) = curve.points
    assert [choice.forecast.samples for choice in point.choices] == [5, 10, 20, 30, 40, 60]
    assert point.best.forecast.samples == 30
    assert point.best.forecast.step_s == pytest.approx(40e-3)
    assert point.best.time == pytest.approx(40 * 4 / (15 * 19))
    assert point.best.efficiency == pytest.approx(0.75)
    assert point.cost == pytest.approx(point.best.time)
    assert point.price_per_million == pytest.approx(3.6 * 40e-3 / 30 * 1e6 / 3600)


def test_without_a_noise_scale_all_samples_are_worth_the_same():
    curve = time_to_goal(profile(batch_size=16), linked(1, 2), None, price_per_worker_hour=2.0)
    alone, both = curve.points
    assert [len(point.choices) for point in curve.points] == [1, 1]
    assert alone.best.efficiency is None
    assert both.best.time == pytest.approx(both.best.forecast.step_s / alone.best.forecast.step_s)
    assert both.price_per_million / alone.price_per_million == pytest.approx(both.cost)


def test_batch_sizes_that_are_tried_go_far_beyond_the_noise_scale_and_the_jobs_own():
    (point,) = time_to_goal(profile(batch_size=12), linked(1, 1), 100.0).points
    assert [c.forecast.samples for c in point.choices] == [3, 6, 12, 24, 48, 96, 192, 384, 768, 1536]


def one_block(forward_s: Curve, backward_s: Curve, batch_size: int) -> Profile:
    made = profile((1.0,), batch_size, ())
    (costs,) = made.costs
    block = costs.blocks[0].model_copy(
        update={"forward_s": forward_s, "backward_s": backward_s, "trained_bytes": 0}
    )
    costs = costs.model_copy(update={"blocks": (block,), "fixed_s": 0.0, "data_s": Curve.line(0.0, 0.0)})
    return made.model_copy(update={"costs": (costs,)})


def test_a_batch_size_that_was_not_measured_is_marked_and_not_the_best():
    """Measured with 4 to 16 samples, a forward pass takes hardly longer with 16: beyond, they would be for nothing."""
    flat = Curve(points=((4.0, 1e-3), (16.0, 1.01e-3)))
    job = one_block(flat, flat.scaled(2.0), batch_size=16)
    (point,) = time_to_goal(job, linked(1, 1), 64.0, batch_sizes=[2, 4, 32, 1024]).points
    assert {c.forecast.samples: c.is_beyond for c in point.choices} == {
        2: True, 4: False, 16: False, 32: False, 1024: False,
    }  # fmt: skip
    for choice in point.choices:
        if not choice.is_beyond:
            assert 4 <= choice.forecast.samples / choice.forecast.layout.micro <= 16
    assert not point.best.is_beyond
    (only,) = time_to_goal(job, linked(1, 1), 64.0, batch_sizes=[], workers=[1]).points
    assert only.best.forecast.samples == 16
    beyond = time_to_goal(job.model_copy(update={"batch_size": 2}), linked(1, 1), 64.0, batch_sizes=[])
    assert beyond.points[0].best.is_beyond


def test_a_job_that_fits_nowhere_is_refused():
    with pytest.raises(LayoutError, match="no layout fits"):
        time_to_goal(profile(), linked(1, 2), 100.0, memory_bytes=GIB // 8, batch_sizes=[])


def planned(noise_scale, **options) -> GoalCurve:
    return time_to_goal(profile(batch_size=16), linked(1, 2), noise_scale, **options)


def test_the_table_names_the_least_time_and_the_least_cost():
    curve = planned(100.0, price_per_worker_hour=2.5)
    console = Console(file=io.StringIO(), width=200)
    print_goal(console, curve, "measured")
    told = console.file.getvalue()
    assert "a gradient noise scale of 100 samples (measured)" in told
    for point in curve.points:
        rows = [[cell.strip() for cell in line.split("│")] for line in told.splitlines() if "│" in line]
        (cells,) = [row for row in rows if row[1] == str(point.workers)]
        assert cells[2] == str(point.best.forecast.samples)
        assert cells[5:8] == [
            f"{point.best.efficiency * 100:.0f} %", f"{point.best.time:.3f}", f"{point.cost:.3f}",
        ]  # fmt: skip
    first = goal_lines(curve)[0]
    assert first.startswith(
        "Time and cost 1: 1 worker with the job's batch of 16. Least time: 2 workers with batches"
    )
    assert "Least cost: 1 worker with batches of" in first


def test_without_a_noise_scale_that_is_said():
    curve = planned(None, price_per_worker_hour=2.5)
    assert any("give --noise-scale or --noise-from" in line for line in goal_lines(curve))
    assert "Least time: 2 workers, for" in goal_lines(curve)[0]


def test_forecasts_outside_of_what_was_measured_are_marked():
    measured = profile(batch_size=16)
    (costs,) = measured.costs
    blocks = tuple(
        block.model_copy(update={"forward_s": Curve(points=((16.0, 1e-3), (32.0, 2e-3)))}) for block in costs.blocks
    )  # fmt: skip
    measured = measured.model_copy(update={"costs": (costs.model_copy(update={"blocks": blocks}),)})
    lines = goal_lines(time_to_goal(measured, linked(1, 1), 10.0))
    assert any(line.startswith("1 worker: batches of ") and "no block was measured" in line for line in lines)
    small = measured.model_copy(update={"batch_size": 1})
    lines = goal_lines(time_to_goal(small, linked(1, 1), 10.0, batch_sizes=[]))
    assert any(line.startswith("* Its micro-batches") for line in lines)


def test_options_that_contradict_each_other_or_say_nothing_are_refused(tmp_path):
    assert _one_noise(5.0, None, 1.0) == 5.0
    assert _one_noise(None, tmp_path, None) == tmp_path
    for wrong in ((5.0, tmp_path, None), (0.0, None, None), (None, None, -1.0), (float("nan"), None, None)):
        with pytest.raises(OptionError, match="Next step: "):
            _one_noise(*wrong)


def test_times_err_as_two_forecasts_do():
    curve = planned(100.0)
    alone, several = curve.points
    own = next(choice for choice in alone.choices if choice.forecast.samples == curve.batch_size)
    assert (own.time, own.time_error) == (1.0, 0.0)
    best = several.best
    relative = [one.forecast.error_s / one.forecast.step_s for one in (own, best)]
    assert best.time_error == pytest.approx(best.time * math.hypot(*relative))


@pytest.mark.parametrize("size", list(Size))
def test_the_picture_shows_each_batch_size_and_each_number_of_workers(size):
    curve = planned(100.0)
    drawn = drawing(curve)
    assert drawn is not None
    figure = drawn.figure(size)
    batches, workers = figure.axes
    shown = [(list(line.get_xdata()), list(line.get_ydata())) for line in (*batches.lines, *workers.lines)]
    for point in curve.points:
        choices = point.choices
        assert ([c.forecast.samples for c in choices], [c.time for c in choices]) in shown
    numbers = [point.workers for point in curve.points]
    assert (numbers, [point.best.time for point in curve.points]) in shown
    assert (numbers, [point.cost for point in curve.points]) in shown
    figure.draw_without_rendering()
    assert figure.get_tightbbox().x1 <= figure.get_size_inches()[0] + 0.01
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names == ["1 worker", "2 workers", "time", "cost"]


def test_there_is_no_picture_where_nothing_can_be_compared():
    assert drawing(time_to_goal(profile(), linked(1, 1), None, price_per_worker_hour=1.0)) is None
    only_workers = drawing(planned(None, price_per_worker_hour=1.0))
    assert only_workers is not None
    assert len(only_workers.figure(Size.WIDE).axes) == 1


def test_the_page_has_the_table_and_what_it_says():
    curve = planned(100.0, price_per_worker_hour=2.5)
    html = goal_section(curve, "a <run>", drawing(curve))
    text = re.sub(r"<[^>]+>", " ", html).replace("\u00a0", " ").replace("&#x27;", "'")
    assert "a gradient noise scale of 100 samples (a &lt;run&gt;)" in text
    for line in goal_lines(curve):
        assert line in text
    for point in curve.points:
        assert f"{point.best.time:.3f}" in text
        assert f"{point.cost:.3f}" in text
    assert 'class="wide"' in html
