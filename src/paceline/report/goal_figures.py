"""The figure of time and cost to a target: against the batch size, and against the number of workers."""

from __future__ import annotations

import functools
import itertools

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from paceline.plan.goal import GoalCurve, GoalPoint
from paceline.report import formats
from paceline.report.axes import error_bars, legend_below
from paceline.report.theme import LIGHT, Drawing, Size

_TOKENS = ("computation", "communication", "data", "optimizer", "weights")
"""Colours of numbers of workers."""
_MOST_TICKS = {Size.WIDE: 7, Size.HALF: 7, Size.NARROW: 6}
_LINEAR_UP_TO = 32


def drawing(curve: GoalCurve) -> Drawing | None:
    """None where there is nothing to compare: one number of workers, and one batch size."""
    against_batch = curve.noise_scale is not None
    against_workers = len(curve.points) > 1
    parts = []
    if against_batch:
        parts.append(
            "time to the target against the batch size; the dashed line is the critical batch size, points that are "
            "empty are beyond what was measured, and a ring is the best of its line"
        )
    if against_workers:
        parts.append("time and cost with the best batch size for each number of workers")
    if not parts:
        return None
    caption = "; ".join(parts)
    caption = f"{caption[0].upper()}{caption[1:]}. Bars are the error of the forecasts."
    return Drawing("goal", "Time and cost to a target", caption, functools.partial(_draw, curve))


def _draw(curve: GoalCurve, size: Size) -> Figure:
    panels = [_draw_batches] * (curve.noise_scale is not None) + [_draw_workers] * (len(curve.points) > 1)
    wide = size is not Size.NARROW
    rows, columns = (1, len(panels)) if wide else (len(panels), 1)
    figure = Figure(figsize=(size.value, 0.3 + 2.9 * rows), layout="constrained")
    handles: list[Line2D] = []
    for axes, draw in zip(figure.subplots(rows, columns, squeeze=False).flat, panels, strict=True):
        handles += draw(axes, curve, size)
    legend_below(figure, handles, 4 if wide else 2)
    return figure


def lines_of(curve: GoalCurve) -> list[GoalPoint]:
    """The numbers of workers that have a line of their own: the fewest, the most, the best, and doublings between."""
    numbers = [point.workers for point in curve.points]
    doublings = [number for number in numbers if number & (number - 1) == 0]
    wanted = dict.fromkeys([numbers[0], numbers[-1], curve.fastest, curve.cheapest, *doublings])
    chosen = sorted(itertools.islice(wanted, len(_TOKENS)))
    return [curve.at(number) for number in chosen]


def _draw_batches(axes: Axes, curve: GoalCurve, size: Size) -> list[Line2D]:
    assert curve.noise_scale is not None
    handles = []
    sizes = sorted({choice.forecast.samples for point in curve.points for choice in point.choices})
    for point, token in zip(lines_of(curve), _TOKENS, strict=False):
        colour = LIGHT[token]
        x = [choice.forecast.samples for choice in point.choices]
        y = [choice.time for choice in point.choices]
        axes.plot(x, y, color=colour, linewidth=1.6)
        for at, choice in enumerate(point.choices):
            face = LIGHT["paper"] if choice.is_beyond else colour
            axes.plot([x[at]], [y[at]], color=colour, marker="o", markersize=4, markerfacecolor=face)
        axes.plot(
            [point.best.forecast.samples], [point.best.time], color=colour, marker="o", markersize=9,
            fillstyle="none", markeredgewidth=1.4,
        )  # fmt: skip
        error_bars(axes, x, y, [choice.time_error for choice in point.choices])
        label = formats.plural(point.workers, "worker")
        handles.append(Line2D([], [], color=colour, linewidth=1.6, label=label))
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    axes.axvline(curve.noise_scale, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.1, zorder=1.5)
    every = -(-len(sizes) // _MOST_TICKS[size])
    # The job's own batch size has a tick.
    axes.xaxis.set_major_locator(FixedLocator(sizes[sizes.index(curve.batch_size) % every :: every]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_minor_locator(NullLocator())
        axis.set_major_formatter(lambda value, _: formats.number(value))
    axes.set_xlabel("batch, samples")
    axes.set_title("time to the target")
    return handles


def _draw_workers(axes: Axes, curve: GoalCurve, size: Size) -> list[Line2D]:
    workers = [point.workers for point in curve.points]
    stacks = (
        ("time", "backward", [p.best.time for p in curve.points], [p.best.time_error for p in curve.points]),
        (
            "cost",
            "message",
            [p.cost for p in curve.points],
            [p.cost * p.best.time_error / p.best.time for p in curve.points],
        ),
    )
    handles = []
    for (name, token, values, errors), style in zip(stacks, ("-", (0, (4, 2))), strict=True):
        (line,) = axes.plot(
            workers, values, color=LIGHT[token], linewidth=1.8, linestyle=style, marker="o", markersize=4, label=name
        )  # fmt: skip
        error_bars(axes, workers, values, errors)
        handles.append(line)
    for at, values in ((curve.fastest, stacks[0][2]), (curve.cheapest, stacks[1][2])):
        axes.plot(
            [at], [values[workers.index(at)]], color=LIGHT["ink"], marker="o", markersize=9, fillstyle="none",
            markeredgewidth=1.4,
        )  # fmt: skip
    if workers[-1] > _LINEAR_UP_TO:
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.xaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        axes.set_ylim(0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=_MOST_TICKS[size]))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(lambda value, _: formats.number(value))
    axes.set_xlabel("workers")
    axes.set_title("least time, and its cost")
    return handles
