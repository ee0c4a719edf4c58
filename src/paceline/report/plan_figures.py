"""The figures of a plan: the timeline of a step, and the speed-up curve with what eats the ideal."""

from __future__ import annotations

import functools

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from paceline.plan.planned import Planned
from paceline.plan.scaling import ScalingCurve
from paceline.plan.spans import StepSpan, StepTimeline, WorkerSpans
from paceline.report import formats, goal_figures
from paceline.report.axes import error_bars, legend_below, time_unit
from paceline.report.plan_text import causes_of, chosen_rows, marks_of, name_of
from paceline.report.span_kinds import CAUSES, EFFICIENT, SPANS, Look
from paceline.report.theme import LIGHT, Drawing, Size

_MOST_ROWS = 16
_MOST_BARS_WITH_TEXT = 10
_LINEAR_UP_TO = 32
"""Workers up to which a curve's axes are linear; beyond, each number is as far from the next as its double."""
_INCHES_OF_A_DIGIT = 0.07
_INCHES_FOR_BORDERS = 0.05


def drawings(planned: Planned) -> list[Drawing]:
    """All figures of a plan, in the order of the page."""
    found: list[Drawing | None] = [_timeline(planned.timeline)]
    found.append(_speedup(planned) if len(planned.curve.points) > 1 else None)
    found.append(goal_figures.drawing(planned.goal) if planned.goal else None)
    return [drawing for drawing in found if drawing is not None]


# --- timeline --------------------------------------------------------------------------------------


def _timeline(timeline: StepTimeline) -> Drawing:
    rows = chosen_rows(timeline, _MOST_ROWS)
    caption = f"A step of {timeline.layout} as it is forecast: {formats.seconds(timeline.step_s)}."
    if _numbered(rows, _inch_s(timeline, Size.WIDE)):
        caption += " Numbers are micro-batches, from 0, where the picture is wide enough."
    if len(rows) < len(timeline.workers):
        caption += f" {len(rows)} of {len(timeline.workers)} workers of the pipeline."
    return Drawing(
        "timeline",
        "What each worker does in a step",
        caption,
        functools.partial(_draw_timeline, timeline, rows),
    )


def _draw_timeline(timeline: StepTimeline, rows: list[WorkerSpans], size: Size) -> Figure:
    kinds = [kind for kind in SPANS if any(kind in row.seconds() for row in rows)]
    columns = _legend_columns(len(kinds), size)
    height = 0.36 * len(rows) + 0.75 + 0.19 * -(-len(kinds) // columns)
    figure = Figure(figsize=(size.value, height), layout="constrained")
    axes = figure.add_subplot()
    scale, unit = time_unit(timeline.step_s)
    inch_s = _inch_s(timeline, size)
    for y, row in enumerate(rows):
        for kind in row.seconds():
            _bars(axes, y, [span for span in row.spans if span.kind == kind], scale, inch_s)
    for y, span in _numbered(rows, inch_s):
        axes.text(
            (span.begin_s + span.end_s) / 2 / scale, y + 0.01, str(span.micro),
            ha="center", va="center", color=LIGHT["label"], size=7,
        )  # fmt: skip
    axes.set_xlim(0, timeline.step_s / scale)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_yticks(range(len(rows)), [name_of(row) for row in rows])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"time, {unit}")
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8 if size is Size.WIDE else 4))
    legend_below(figure, [_patch(SPANS[kind]) for kind in kinds], columns)
    return figure


def _bars(axes: Axes, y: int, spans: list[StepSpan], scale: float, inch_s: float) -> None:
    """Spans of one kind: with borders where these leave something of them, else in one piece with those they touch."""
    wide = [span for span in spans if span.seconds > _INCHES_FOR_BORDERS * inch_s]
    pieces: list[tuple[float, float]] = []
    for span in spans:
        if span.seconds > _INCHES_FOR_BORDERS * inch_s:
            continue
        if pieces and pieces[-1][1] == span.begin_s:
            pieces[-1] = (pieces[-1][0], span.end_s)
        else:
            pieces.append((span.begin_s, span.end_s))
    for found, width in (([(span.begin_s, span.end_s) for span in wide], 0.6), (pieces, 0.0)):
        axes.broken_barh(
            [(begin_s / scale, (end_s - begin_s) / scale) for begin_s, end_s in found],
            (y - 0.38, 0.76),
            facecolor=LIGHT[SPANS[spans[0].kind].token],
            edgecolor=LIGHT["paper"],
            linewidth=width,
        )


def _inch_s(timeline: StepTimeline, size: Size) -> float:
    """Seconds of a step to an inch of the figure, the names of workers left out."""
    return timeline.step_s / (size.value - 1.0)


def _numbered(rows: list[WorkerSpans], inch_s: float) -> list[tuple[int, StepSpan]]:
    """The passes of micro-batches with their rows, where every one of them is wide enough for its number."""
    passes = [
        (y, span)
        for y, row in enumerate(rows)
        for span in row.spans
        if span.micro is not None and span.kind in ("forward", "backward", "weights")
    ]
    if len({span.micro for _, span in passes}) < 2:
        return []
    fits = all(
        span.seconds > (len(str(span.micro)) + 0.4) * _INCHES_OF_A_DIGIT * inch_s for _, span in passes
    )
    return passes if fits else []


# --- speed-up --------------------------------------------------------------------------------------


def _speedup(planned: Planned) -> Drawing:
    caption = (
        "First the speed-up over the fewest workers, its error as bars, and dashed the ideal; then the share of the "
        "workers' time that brings speed-up, which is the efficiency, and what takes the rest."
    )
    return Drawing("speedup", "What more workers bring", caption, functools.partial(_draw_speedup, planned))


def _draw_speedup(planned: Planned, size: Size) -> Figure:
    wide = size is Size.WIDE
    there = causes_of(planned)
    columns = _legend_columns(len(there) + 1, size)
    below = 0.2 * -(-(len(there) + 1) // columns)
    figure = Figure(figsize=(size.value, (3.1 if wide else 5.2) + below), layout="constrained")
    curve, shares = figure.subplots(1 if wide else 2, 2 if wide else 1, squeeze=False).flat
    _draw_curve(curve, planned.curve)
    _draw_losses(shares, planned, there)
    legend_below(figure, [_patch(EFFICIENT), *(_patch(CAUSES[cause]) for cause in there)], columns)
    return figure


def _draw_curve(axes: Axes, curve: ScalingCurve) -> None:
    workers = [point.workers for point in curve.points]
    speedups = [point.speedup for point in curve.points]
    ends = [workers[0], workers[-1]]
    axes.plot(ends, ends, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.1)
    axes.plot(workers, speedups, color=LIGHT["computation"], linewidth=1.8, marker="o", markersize=4)
    error_bars(axes, workers, speedups, [point.speedup_error for point in curve.points])
    if workers[-1] > _LINEAR_UP_TO:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
    else:
        axes.set_ylim(0)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: formats.number(value))
        if workers[-1] <= _LINEAR_UP_TO:
            axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
    # Above the ideal there is always room.
    for place, (name, at) in enumerate(marks_of(curve).items()):
        speedup = speedups[workers.index(at)]
        axes.plot(
            [at], [speedup], color=LIGHT["communication"], marker="o", markersize=9, fillstyle="none",
            markeredgewidth=1.6,
        )  # fmt: skip
        told = f"{name}: {formats.plural(at, 'worker')}, {formats.times(speedup)}"
        axes.annotate(
            told, (0.03, 0.97), xytext=(0, -13 * place), xycoords="axes fraction", textcoords="offset points",
            va="top", bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6},
        )  # fmt: skip
    axes.set_xlabel("workers")
    axes.set_title("speed-up")


def _draw_losses(axes: Axes, planned: Planned, there: list[str]) -> None:
    points, losses = planned.curve.points, planned.losses
    few = len(points) <= _MOST_BARS_WITH_TEXT
    x = list(range(len(points)))
    stacks = [(EFFICIENT, [1 - sum(lost.values()) for lost in losses])]
    stacks += [(CAUSES[cause], [lost[cause] for lost in losses]) for cause in there]
    bottom = [0.0] * len(x)
    for look, heights in stacks:
        axes.bar(
            x, heights, bottom=bottom, width=0.8, color=LIGHT[look.token], edgecolor=LIGHT["paper"], linewidth=0.5
        )  # fmt: skip
        bottom = [low + height for low, height in zip(bottom, heights, strict=True)]
    if few:
        for at, share in zip(x, stacks[0][1], strict=True):
            if share > 0.08:
                axes.text(at, 0.02, f"{share:.0%}", color=LIGHT["label"], ha="center", va="bottom", size=7)
        for name, number in marks_of(planned.curve).items():
            at = next(at for at, point in enumerate(points) if point.workers == number)
            # In the middle of its bar; at the right edge of the last, where a longer one would leave the figure.
            last = at == len(points) - 1
            axes.text(at + 0.4 * last, 1.02, name, ha="right" if last else "center", va="bottom", size=8)
    axes.set_xticks(x, [formats.count(point.workers) for point in points], size=8.5 if few else 7)
    axes.set_ylim(0, 1.1 if few else 1)
    axes.yaxis.set_major_locator(FixedLocator([0, 0.25, 0.5, 0.75, 1]))
    axes.yaxis.set_major_formatter(lambda value, _: formats.percent(value))
    axes.grid(axis="x", visible=False)
    axes.set_xlabel("workers")
    axes.set_title("share of the workers' time")


def _legend_columns(number: int, size: Size) -> int:
    if size is not Size.WIDE:
        return 2
    return number if number <= 5 else 4


def _patch(look: Look) -> Patch:
    return Patch(color=LIGHT[look.token], label=look.words)
