"""The figures of a run. Each says one thing; what has no data is not drawn."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from paceline.report import formats
from paceline.report.analysis import PARTS, Comparison, Measured, RankTime, compare, rank_times
from paceline.report.axes import legend, time_unit
from paceline.report.curves import Floats, smooth, thin
from paceline.report.reader import RunLog
from paceline.report.theme import LIGHT, Drawing, Size

_MOST_RANKS = 12
_MOST_METRICS = 6


def drawings(log: RunLog) -> list[Drawing]:
    """All figures that the run's events allow, in the order of the page."""
    found: list[Drawing] = []
    if log.steps:
        found += [_loss(log, by_time=False), _loss(log, by_time=True)]
    names = _metric_names(log)
    if names and len({evaluation.step for evaluation in log.evaluations}) > 1:
        found.append(
            Drawing(
                "held_out_metrics",
                "Held-out metrics",
                "Each point is one evaluation on the test split.",
                functools.partial(_draw_metrics, log, names),
            )
        )
    comparison = compare(log)
    if comparison.measured:
        found.append(_layouts(comparison))
    times = rank_times(log)
    if times:
        found.append(_ranks(times))
    return found


# --- loss ------------------------------------------------------------------------------------------


def _loss(log: RunLog, *, by_time: bool) -> Drawing:
    window = _window(len(log.steps))
    caption = "Thin: the loss of every step's global batch."
    if window > 1:
        caption += f" Thick: its mean over {window} steps."
    else:
        caption = "The loss of every step's global batch."
    if log.evaluations:
        caption += " Orange: the loss on the test split, which is not trained on."
    bad = [step.step for step in log.steps if not np.isfinite(step.loss)]
    if bad:
        caption += (
            f" The training loss is not finite at {formats.plural(len(bad), 'step')}, first at step {bad[0]}"
            " (dashed line)."
        )
    return Drawing(
        "loss_by_time" if by_time else "loss_by_step",
        "Loss over time" if by_time else "Loss over steps",
        caption,
        functools.partial(_draw_loss, log, by_time),
    )


def _draw_loss(log: RunLog, by_time: bool, size: Size) -> Figure:
    figure, axes = _axes(size, height={Size.WIDE: 3.1, Size.HALF: 2.9, Size.NARROW: 2.7}[size])
    scale, unit = time_unit(log.steps[-1].elapsed_s) if by_time else (1.0, "")
    x = np.array([step.elapsed_s / scale if by_time else step.step for step in log.steps], dtype=float)
    loss = np.array([step.loss for step in log.steps], dtype=float)
    window = _window(len(loss))
    blue, orange = LIGHT["computation"], LIGHT["communication"]
    lines = loss
    if window > 1:
        axes.plot(*thin(x, loss), color=blue, alpha=0.3, linewidth=0.8)
        lines = smooth(loss, window)
    few = len(loss) <= 30
    axes.plot(
        *thin(x, lines),
        color=blue,
        linewidth=1.8,
        label="training",
        marker="o" if few else "",
        markersize=3.5,
    )
    points = [
        (e.elapsed_s / scale if by_time else e.step, e.metrics.get("loss", np.nan)) for e in log.evaluations
    ]
    if points:
        test_x, test = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axes.plot(
            test_x, test, color=orange, marker="o", markersize=5, linestyle="", label="held out",
            markeredgecolor=LIGHT["paper"], markeredgewidth=0.8,
        )  # fmt: skip
    else:
        test = np.array([])
    _mark_not_finite(axes, x, loss)
    _limit(axes, loss, lines, test)
    axes.set_xlabel(f"training time, {unit}" if by_time else "step")
    axes.set_ylabel("loss")
    if not by_time:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.margins(x=0.02)
    legend(axes)
    return figure


def _mark_not_finite(axes: Axes, x: Floats, loss: Floats) -> None:
    bad = np.flatnonzero(~np.isfinite(loss))
    if len(bad):
        axes.axvline(x[bad[0]], color=LIGHT["ink"], linewidth=1, linestyle=(0, (4, 3)))


def _limit(axes: Axes, raw: Floats, line: Floats, points: Floats) -> None:
    """Fit the loss axis to what matters: a rare spike of a single step may leave the frame."""
    raw = raw[np.isfinite(raw)]
    shown = np.concatenate([np.percentile(raw, [0.5, 99.5]) if len(raw) else [], line, points])
    shown = shown[np.isfinite(shown)]
    if len(shown) == 0:
        return
    low, high = float(shown.min()), float(shown.max())
    if low > 0 and high / low > 40:
        axes.set_yscale("log")
        axes.set_ylim(low / 1.2, high * 1.2)
        return
    room = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - room, high + room)


def _window(num_steps: int) -> int:
    """Steps to smooth over: a fiftieth of the run; 1 where every step can be seen for itself."""
    return 1 if num_steps < 60 else max(5, num_steps // 50) | 1


# --- held-out metrics ------------------------------------------------------------------------------


def _metric_names(log: RunLog) -> list[str]:
    """Metrics besides the loss (which has its own figure), in the order of the job."""
    names = dict.fromkeys(name for e in log.evaluations for name in e.metrics if name != "loss")
    return list(names)[:_MOST_METRICS]


def _draw_metrics(log: RunLog, names: Sequence[str], size: Size) -> Figure:
    columns = min(len(names), 3 if len(names) > 2 else 2) if size is Size.WIDE else 1
    rows = -(-len(names) // columns)
    figure = Figure(figsize=(size.value, 2.3 * rows + 0.2), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, name in zip(grid.flat, names, strict=False):
        points = [(e.step, e.metrics[name]) for e in log.evaluations if name in e.metrics]
        x, y = (np.array(column, dtype=float) for column in zip(*points, strict=True))
        axes.plot(x, y, color=LIGHT["communication"], linewidth=1.4, marker="o", markersize=4)
        axes.set_title(formats.shorten(name, 34))
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    for axes in list(grid.flat)[len(names) :]:
        axes.remove()
    return figure


# --- layouts ---------------------------------------------------------------------------------------


def _layouts(comparison: Comparison) -> Drawing:
    caption = "Longer is faster. Bars: the median round; whiskers: from the slowest round to the fastest."
    if comparison.chosen:
        caption += " Blue: the layout that was chosen."
    if comparison.unit:
        caption += f" Dotted line: {comparison.unit.label}."
    if _ideal_in_sight(comparison):
        caption += f" Dashed line: {comparison.processors} times that, the ideal."
    elif comparison.ideal_samples_per_s and comparison.processors != 1:
        caption += f" The ideal, {comparison.processors} times that, lies far outside."
    return Drawing(
        "layouts", "Samples per second of each layout", caption, functools.partial(_draw_layouts, comparison)
    )


def _ideal_in_sight(comparison: Comparison) -> bool:
    """Whether the ideal is a line of its own that leaves the bars long enough to compare."""
    ideal = comparison.ideal_samples_per_s
    fastest = max(row.samples_per_s.median for row in comparison.measured)
    return ideal is not None and comparison.processors != 1 and ideal <= 3 * fastest


def _draw_layouts(comparison: Comparison, size: Size) -> Figure:
    rows = comparison.measured
    figure, axes = _axes(size, height=0.5 * len(rows) + 0.85)
    for y, row in enumerate(rows):
        speed = row.samples_per_s
        colour = LIGHT["computation"] if row is comparison.chosen else LIGHT["rest"]
        axes.barh(y, speed.median, height=0.42, color=colour)
        axes.plot(
            [speed.low, speed.high], [y, y], color=LIGHT["ink"], linewidth=1.3, marker="|", markersize=7
        )
        _above(axes, y - 0.27, _bar_text(row))
    longest = max(row.samples_per_s.high for row in rows)
    if comparison.unit:
        axes.axvline(
            comparison.unit.samples_per_s.median, color=LIGHT["muted"], linestyle=(0, (1, 2)), linewidth=1.3
        )
    ideal = comparison.ideal_samples_per_s
    if ideal is not None and _ideal_in_sight(comparison):
        axes.axvline(ideal, color=LIGHT["muted"], linestyle=(0, (5, 3)), linewidth=1.1)
        longest = max(longest, ideal)
    axes.set_xlim(0, longest * 1.04)
    axes.set_ylim(len(rows) - 0.68, -0.72)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel("samples per second")
    axes.xaxis.set_major_formatter(lambda value, _: formats.number(value))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6 if size is Size.WIDE else 4))
    return figure


def _bar_text(row: Measured) -> str:
    speed = f"{row.label}: {formats.number(row.samples_per_s.median)}/s"
    return speed if row.speedup is None else f"{speed}, {formats.times(row.speedup.median)}"


# --- where a step's time goes ----------------------------------------------------------------------


def _ranks(times: Sequence[RankTime]) -> Drawing:
    shown = _choose_ranks(times)
    caption = "Each bar is one worker's average step. Communication includes the wait for other workers."
    if len(shown) < len(times):
        caption += f" {len(shown)} of {len(times)} workers, from the least computation to the most."
    return Drawing(
        "time_per_rank", "Where a step's time goes", caption, functools.partial(_draw_ranks, shown)
    )


def _choose_ranks(times: Sequence[RankTime]) -> Sequence[RankTime]:
    if len(times) <= _MOST_RANKS:
        return times
    by_work = sorted(times, key=lambda t: t.parts_s["computation"])
    return [by_work[round(i)] for i in np.linspace(0, len(by_work) - 1, _MOST_RANKS)]


def _draw_ranks(times: Sequence[RankTime], size: Size) -> Figure:
    figure, axes = _axes(size, height=0.52 * len(times) + (1.05 if size is Size.WIDE else 1.25))
    longest_s = max(t.step_s for t in times) or 1.0
    scale, unit = time_unit(longest_s)
    for y, time in enumerate(times):
        left = 0.0
        for part in PARTS:
            width = time.parts_s[part] / scale
            axes.barh(
                y, width, left=left, height=0.46, color=LIGHT[part], label=part if y == 0 else "",
                edgecolor=LIGHT["paper"], linewidth=0.8,
            )  # fmt: skip
            if time.parts_s[part] > (0.085 if size is Size.WIDE else 0.17) * longest_s:
                axes.text(
                    left + width / 2, y + 0.01, formats.percent(time.share(part)),
                    ha="center", va="center", color=LIGHT["label"], size=8.5,
                )  # fmt: skip
            left += width
        title = f"rank {time.rank}: {formats.seconds(time.step_s)} per step"
        _above(axes, y - 0.28, title)
    axes.set_xlim(0, longest_s / scale * 1.01)
    axes.set_ylim(len(times) - 0.68, -0.74)
    axes.set_yticks([])
    axes.grid(axis="y", visible=False)
    axes.set_xlabel(f"time per step, {unit}")
    legend(axes, columns=5 if size is Size.WIDE else 3)
    return figure


# --- shared ----------------------------------------------------------------------------------------


def _axes(size: Size, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(size.value, height), layout="constrained")
    return figure, figure.add_subplot()


def _above(axes: Axes, y: float, told: str) -> None:
    """Text that starts at the left edge, on the page's colour so that no line crosses it."""
    axes.annotate(
        formats.shorten(told, 64), (0, y), xytext=(1, 1.5), textcoords="offset points", va="bottom",
        bbox={"facecolor": LIGHT["paper"], "edgecolor": "none", "pad": 0.6}, zorder=5, in_layout=False,
    )  # fmt: skip
