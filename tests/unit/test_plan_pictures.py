"""A plan's pictures: in the terminal, as figures and as a page."""

from __future__ import annotations

import io
import itertools
import random
import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.collections import PolyCollection
from matplotlib.colors import to_hex
from matplotlib.patches import Rectangle
from planning_examples import linked, profile
from rich.console import Console

from paceline.plan.forecast import Forecaster
from paceline.plan.planned import Planned, planned
from paceline.plan.scaling import scaling
from paceline.plan.search import search
from paceline.plan.spans import TERM_OF, StepSpan, WorkerSpans, step_timeline
from paceline.records import Layout
from paceline.report import formats, write_plan
from paceline.report.plan_figures import drawings
from paceline.report.plan_text import (
    causes_of,
    cells,
    curve_text,
    losses_table,
    lost_share,
    timeline_text,
)
from paceline.report.plans import knee_sentence, print_plan
from paceline.report.span_kinds import CAUSES, EFFICIENT, SPANS
from paceline.report.theme import LIGHT, Size


def plan_of(scales: tuple[float, ...], batch_size: int, *where: int, job: str = "a test") -> Planned:
    forecaster = Forecaster(profile(scales, batch_size, ()).model_copy(update={"job": job}), linked(*where))
    found = search(forecaster, number=3)
    return planned(forecaster, found, scaling(forecaster))


@pytest.fixture(scope="module")
def pipeline() -> Planned:
    """Eight workers on four hosts: four stages of a pipeline on two workers each."""
    told = plan_of((1.0,) * 8, 32, 4, 2)
    assert told.timeline.layout.pp == 4
    assert {"message", "bubble", "gradients"} <= told.timeline.workers[1].seconds().keys()
    return told


@pytest.fixture(scope="module")
def alone() -> Planned:
    return plan_of((1.0, 1.0), 8, 1, 1, job="<script>alert(1)</script>")


@settings(max_examples=100, deadline=None, derandomize=True)
@given(st.integers(0, 2**32), st.integers(20, 150))
def test_each_kind_has_its_share_of_a_line(seed, columns):
    drawn = random.Random(seed)
    bounds = [0.0, *itertools.accumulate(drawn.expovariate(1.0) ** 2 for _ in range(drawn.randint(1, 300)))]
    kinds = drawn.sample(list(SPANS), drawn.randint(1, 5))
    spans = tuple(
        StepSpan(kind=drawn.choice(kinds), begin_s=a, end_s=b) for a, b in itertools.pairwise(bounds)
    )
    worker = WorkerSpans(ranks=(0,), spans=spans)
    shown = cells(worker, bounds[-1], columns)
    assert len(shown) == columns
    for column, kind in enumerate(shown):
        begin_s, end_s = (at * bounds[-1] / columns for at in (column, column + 1))
        there = {s.kind for s in spans if s.begin_s < end_s + 1e-9 and s.end_s > begin_s - 1e-9}
        assert kind in there, "a kind is shown where it is not"
    counted = Counter(shown)
    for kind, seconds in worker.seconds().items():
        assert abs(counted[kind] - columns * seconds / bounds[-1]) < 2, kind


@pytest.mark.parametrize("width", [60, 80, 133])
def test_the_timeline_fits_the_terminal_and_has_a_line_for_each_worker(width):
    # Whichever is fastest, in this one the last worker has the last stage.
    layout = Layout.parse("pp=4,dp_replicate=2,micro=16,schedule=zb-h1,threads=1")
    timeline = step_timeline(Forecaster(profile((1.0,) * 8, 32, ()), linked(4, 2)), layout)
    lines = [line.plain for line in timeline_text(timeline, width)]
    assert all(len(line) <= width for line in lines[1:])  # the title may be broken
    step = formats.seconds(timeline.step_s)
    assert lines[0] == f"A step of {timeline.layout}: {step}"
    names = ["workers 0–1  ", "workers 2–3  ", "workers 4–5  ", "workers 6–7  "]
    assert [line[:13] for line in lines[1:5]] == names
    assert lines[5].split() == ["0", *step.split()]
    legend = " ".join(lines[6:])
    for kind, seconds in timeline.workers[timeline.busiest].seconds().items():
        look = SPANS[kind]
        assert f"{look.block} {look.words}" in legend
        if seconds > 0.01 * timeline.step_s:
            share = formats.percent(seconds / timeline.step_s)
            assert f"{look.words} {share}" in legend
            assert look.block in lines[1 + timeline.busiest]
    # The pipeline fills from the first worker to the last, and its last worker has the first gradients.
    starts = [line[13:].index(SPANS["forward"].block) for line in lines[1:5]]
    backs = [line[13:].index(SPANS["backward"].block) for line in lines[1:5]]
    assert starts == sorted(starts)
    assert backs == sorted(backs, reverse=True)


def test_every_character_and_colour_has_one_meaning():
    assert SPANS.keys() == TERM_OF.keys()
    assert len({look.block for look in SPANS.values()}) == len(SPANS)
    assert len({look.token for look in SPANS.values()}) == len(SPANS)
    causes = [EFFICIENT, *CAUSES.values()]
    assert len({look.block for look in causes}) == len({look.token for look in causes}) == len(causes)
    assert all(look.token in LIGHT for look in [*SPANS.values(), *causes])


def test_the_curve_shows_what_of_the_time_counts(pipeline):
    lines = [line.plain for line in curve_text(pipeline, 80)]
    assert all(len(line) <= 80 for line in lines)
    for line, point, lost in zip(lines[1:], pipeline.curve.points, pipeline.losses, strict=False):
        assert line.split()[:2] == [str(point.workers), f"{point.speedup:.2f}×"]
        assert formats.percent(point.efficiency) in line
        assert (f"× ± {point.speedup_error:.2g} " in line) == (point.workers > 1)
        bar = line[38:].split("  ")[0]
        assert len(bar) == len(lines[1][38:].split("  ")[0])
        assert abs(bar.count("█") - len(bar) * point.efficiency) <= 0.5
        for cause, share in lost.items():
            assert abs(bar.count(CAUSES[cause].block) - len(bar) * share) <= 1
    marked = {int(line.split()[0]) for line in lines if "←" in line}
    assert marked == {pipeline.curve.knee, pipeline.curve.turn}


def test_what_is_printed_into_a_pipe_is_plain_and_complete(pipeline):
    stream = io.StringIO()
    print_plan(Console(file=stream, width=90), pipeline)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 90
    flat = " ".join(text.split())
    for sentence in (*pipeline.advice.sentences, knee_sentence(pipeline)):
        assert sentence in flat
    for forecast in pipeline.found.fastest:
        assert re.search(rf"^{re.escape(str(forecast.layout))} +{forecast.step_s * 1e3:.4g} ± ", text, re.M)
    rows = [" ".join(line.split()) for line in text.splitlines()]
    for point, lost in zip(pipeline.curve.points, pipeline.losses, strict=True):
        shares = [lost_share(lost[cause]) for cause in causes_of(pipeline)]
        assert " ".join([str(point.workers), *shares]) in rows


def test_colours_are_used_where_the_terminal_has_them(pipeline):
    stream = io.StringIO()
    print_plan(Console(file=stream, width=80, force_terminal=True), pipeline)
    assert "\x1b[" in stream.getvalue()


def test_layouts_of_the_curve_are_told_where_there_is_room(pipeline):
    def printed(width: int) -> str:
        stream = io.StringIO()
        Console(file=stream, width=width).print(losses_table(pipeline, width))
        return stream.getvalue()

    assert "fastest layout" not in printed(80)
    assert all(str(point.forecast.layout) in printed(140) for point in pipeline.curve.points)


@pytest.mark.parametrize("size", [Size.WIDE, Size.NARROW])
def test_bars_of_the_timeline_are_its_spans(pipeline, size):
    timeline = pipeline.timeline
    drawn = next(drawing for drawing in drawings(pipeline) if drawing.name == "timeline")
    axes = drawn.figure(size).axes[0]
    unit = 1e3  # in milliseconds
    found: dict[tuple[int, str], float] = {}
    for collection in axes.collections:
        assert isinstance(collection, PolyCollection)
        for path in collection.get_paths():
            (left, low), (right, high) = path.vertices.min(axis=0), path.vertices.max(axis=0)
            key = round((low + high) / 2), to_hex(collection.get_facecolor()[0])
            found[key] = found.get(key, 0.0) + right - left
    wanted = {
        (at, LIGHT[SPANS[kind].token]): seconds * unit
        for at, worker in enumerate(timeline.workers)
        for kind, seconds in worker.seconds().items()
    }
    assert found == pytest.approx(wanted)
    assert axes.get_xlim()[1] == pytest.approx(timeline.step_s * unit)
    assert axes.get_yticklabels()[0].get_text() == "workers 0–1"


def test_bars_of_the_curve_are_its_losses(pipeline):
    drawn = next(drawing for drawing in drawings(pipeline) if drawing.name == "speedup")
    curve, shares = drawn.figure(Size.WIDE).axes
    line = next(line for line in curve.lines if len(line.get_xdata()) == len(pipeline.curve.points))
    assert list(line.get_ydata()) == [point.speedup for point in pipeline.curve.points]
    (bars,) = curve.collections
    ends = [y for path in bars.get_paths() for y in sorted(y for _, y in path.vertices)]
    several = pipeline.curve.points[1:]
    wanted = [point.speedup + sign * point.speedup_error for point in several for sign in (-1, 1)]
    assert ends == pytest.approx(wanted)
    heights: dict[tuple[int, str], float] = {}
    tops: dict[int, float] = {}
    for patch in shares.patches:
        assert isinstance(patch, Rectangle)
        at = round(patch.get_x() + 0.4)
        heights[at, to_hex(patch.get_facecolor())] = patch.get_height()
        tops[at] = max(tops.get(at, 0.0), patch.get_y() + patch.get_height())
    assert tops == pytest.approx(dict.fromkeys(range(len(pipeline.curve.points)), 1.0), abs=2e-3)
    for at, (point, lost) in enumerate(zip(pipeline.curve.points, pipeline.losses, strict=True)):
        assert heights[at, LIGHT[EFFICIENT.token]] == pytest.approx(point.efficiency)
        for cause, share in lost.items():
            assert heights.get((at, LIGHT[CAUSES[cause].token]), 0.0) == pytest.approx(share, abs=5e-4)
    texts = {text.get_text() for text in (*curve.texts, *shares.texts)}
    speedup = next(p.speedup for p in pipeline.curve.points if p.workers == pipeline.curve.knee)
    assert any(f"{pipeline.curve.knee} workers, {speedup:.2f}×" in text for text in texts)


def test_numbers_of_micro_batches_are_shown_where_they_fit():
    def numbers(told: Planned) -> set[str]:
        axes = drawings(told)[0].figure(Size.WIDE).axes[0]
        return {text.get_text() for text in axes.texts}

    few = plan_of((1.0,) * 2, 4, 2, 1)
    assert few.timeline.layout.micro == 4
    assert numbers(few) == {"0", "1", "2", "3"}
    assert numbers(plan_of((1.0,) * 2, 1, 1, 1)) == set()


def test_nothing_of_a_figure_is_cut_off(pipeline):
    for drawing in drawings(pipeline):
        for size in (Size.WIDE, Size.NARROW):
            figure = drawing.figure(size)
            figure.draw_without_rendering()
            tight = figure.get_tightbbox()
            width, height = figure.get_size_inches()
            assert tight.x0 >= -0.01, (drawing.name, size)
            assert tight.x1 <= width + 0.01, (drawing.name, size)
            assert tight.y0 >= -0.01, (drawing.name, size)
            assert tight.y1 <= height + 0.01, (drawing.name, size)
            (legend,) = figure.legends
            lowest = min(axes.get_tightbbox().y0 for axes in figure.axes)
            assert legend.get_window_extent().y1 <= lowest, (drawing.name, size)


def test_files_are_written_and_hold_the_numbers(pipeline, tmp_path):
    page = write_plan(pipeline, tmp_path, ["Speeds are <estimated>."])
    assert {path.name for path in tmp_path.iterdir()} == {"plan.html", "timeline.png", "speedup.png"}
    for name in ("timeline.png", "speedup.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")
    html = page.read_text()
    assert not re.search(r"<(script|link|img|iframe|object)|https?:|@import|url\((?!#)", html)
    assert "default-src 'none'" in html
    assert "Speeds are &lt;estimated&gt;." in html
    body = html[html.index("<body>") :]
    assert re.findall(r"(?:fill|stroke|color): ?#\w+", body) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", html))
    assert used <= set(re.findall(r"--([\w-]+):", html))
    text = re.sub(r"<[^>]+>", "", html).replace("\u00a0", " ").replace("&#x27;", "'")
    best = pipeline.found.fastest[0]
    for words in (
        *pipeline.advice.sentences,
        knee_sentence(pipeline),
        formats.seconds(best.step_s),
        formats.size(best.memory.own),
        *(formats.times(point.speedup) for point in pipeline.curve.points),
        *(f"± {formats.seconds(forecast.error_s)}" for forecast in pipeline.found.fastest),
        *(formats.times(change.factor) for change in pipeline.advice.changes),
        *(str(forecast.layout) for forecast in pipeline.found.fastest),
        "4 hosts, each",
    ):
        assert words in text, words


def test_one_worker_has_no_curve_and_a_jobs_name_is_no_markup(alone, tmp_path):
    html = write_plan(alone, tmp_path).read_text()
    assert {path.name for path in tmp_path.iterdir()} == {"plan.html", "timeline.png"}
    assert "<script>" not in html
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert knee_sentence(alone) == "The job can use 1 worker here, and no other number."


def test_the_example_in_the_documentation_is_what_is_printed():
    text = (Path(__file__).parents[2] / "docs" / "planning.md").read_text()
    told = plan_of((1.0,) * 8, 8, 4, 2)
    lines = [*timeline_text(told.timeline, 100), *curve_text(told, 100)]
    for words in (*(line.plain for line in lines), knee_sentence(told), *told.advice.sentences):
        assert f"\n{words}\n" in text
