"""Time and cost to a target in the terminal: a table over numbers of workers, and what it says."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.plan.goal import GoalCurve, GoalPoint
from paceline.report import formats
from paceline.report.noise import in_samples

_WORTH_A_WORD = 0.98
"""A batch size that was not measured is named where it would take less than this share of the time."""


def print_goal(console: Console, curve: GoalCurve, source: str = "") -> None:
    """A table of the best batch size for each number of workers, and which of them is fastest, and cheapest.

    Args:
        source: where the noise scale is from.
    """
    console.print()
    if told := critical_batch(curve, source):
        console.print(Text(told), soft_wrap=True)
    table = Table(title="Time and cost to a target, by forecast", title_justify="left")
    for name in ("workers", "batch", "ms per step", "samples/s", "efficiency", "time", "cost"):
        table.add_column(name, justify="right")
    if curve.price_per_worker_hour is not None:
        table.add_column("price of 1 M samples", justify="right")
    table.add_column("layout", overflow="fold")
    for point in curve.points:
        table.add_row(*_row(curve, point))
    console.print(table)
    for line in goal_lines(curve):
        console.print(Text(line), soft_wrap=True)


def critical_batch(curve: GoalCurve, source: str) -> str:
    """The noise scale, and where it is from; nothing where none is known."""
    if curve.noise_scale is None:
        return ""
    whence = f" ({source})" if source else ""
    return f"With a gradient noise scale of {in_samples(curve.noise_scale)}{whence}, that is the critical batch size."


def _row(curve: GoalCurve, point: GoalPoint) -> list[str]:
    best = point.best
    row = [
        str(point.workers),
        formats.count(best.forecast.samples) + ("*" if best.is_beyond else ""),
        f"{best.forecast.step_s * 1e3:.4g}",
        f"{best.forecast.samples_per_s:.4g}",
        "–" if best.efficiency is None else formats.percent(best.efficiency),
        f"{best.time:.3f}",
        f"{point.cost:.3f}",
    ]
    if point.price_per_million is not None:
        row.append(formats.number(point.price_per_million))
    return [*row, str(best.forecast.layout)]


def goal_lines(curve: GoalCurve) -> list[str]:
    """What the table says, in sentences."""
    first, fast, cheap = curve.points[0], curve.at(curve.fastest), curve.at(curve.cheapest)
    workers, own = formats.plural(first.workers, "worker"), formats.count(curve.batch_size)
    lines = [f"Time and cost 1: {workers} with the job's batch of {own}. {_extreme(curve, fast, cheap)}"]
    if curve.noise_scale is None:
        lines.append(
            "Without a gradient noise scale only the job's own batch size is looked at, and all samples are worth the "
            "same: give --noise-scale or --noise-from."
        )
    else:
        lines.append(
            "This takes for granted that the learning rate is fit for each batch size, and that the noise scale stays "
            "what it is: it grows while the loss falls."
        )
    if any(point.best.is_beyond for point in curve.points):
        lines.append(
            "* Its micro-batches are smaller or larger than those measured: the forecast goes on in a straight line."
        )
    lines += [text for point in curve.points if (text := _beyond(point))]
    return lines


def _extreme(curve: GoalCurve, fast: GoalPoint, cheap: GoalPoint) -> str:
    def told(point: GoalPoint) -> str:
        text = formats.plural(point.workers, "worker")
        return (
            text
            if curve.noise_scale is None
            else f"{text} with batches of {formats.count(point.best.forecast.samples)}"
        )

    if fast is cheap:
        return f"Least time and least cost: {told(fast)}."
    dearer, slower = formats.times(fast.cost / cheap.cost), formats.times(cheap.best.time / fast.best.time)
    return (
        f"Least time: {told(fast)}, for {dearer} the cost. Least cost: {told(cheap)}, in {slower} the time."
    )


def _beyond(point: GoalPoint) -> str:
    """Of a batch size outside of what was measured that looks better than the best within."""
    if point.best.is_beyond:
        return ""
    other = min((c for c in point.choices if c.is_beyond), key=lambda c: c.time, default=None)
    if other is None or other.time > _WORTH_A_WORD * point.best.time:
        return ""
    return (
        f"{formats.plural(point.workers, 'worker')}: batches of {formats.count(other.forecast.samples)} might take "
        f"{formats.times(other.time / point.best.time)} the time, but no block was measured with micro-batches of "
        "their size."
    )
