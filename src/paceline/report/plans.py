"""A plan in words and tables: the fastest layouts, why the others lost, and what more workers would bring."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.forecast import Forecast
from paceline.plan.scaling import ScalingCurve
from paceline.plan.search import Found

_BAR = 40
"""Characters of the longest bar of the curve."""


def print_plan(console: Console, found: Found, curve: ScalingCurve, notes: Sequence[str] = ()) -> None:
    """The ranked table, a reason for each layout that lost, and the speed-up curve with its knee.

    Args:
        notes: what to know of the numbers before they are read.
    """
    for note in notes:
        console.print(Text(note))
    if notes:
        console.print()
    best = found.fastest[0]
    table = Table(title=f"The fastest of {found.num_possible:,} layouts, by forecast", title_justify="left")
    table.add_column("layout", no_wrap=True)
    for name in ("ms per step", "samples/s", "MiB per worker"):
        table.add_column(name, justify="right")
    table.add_column("limited by")
    for forecast in found.fastest:
        table.add_row(
            str(forecast.layout),
            f"{forecast.step_s * 1e3:.4g}",
            f"{forecast.samples_per_s:.4g}",
            f"{forecast.memory.total / 2**20:,.0f}",
            limited_by(forecast),
        )
    console.print(table)
    for forecast in found.fastest[1:]:
        console.print(Text(why_it_lost(forecast, best)))
    console.print()
    for line in curve_lines(curve):
        console.print(Text(line))


def curve_lines(curve: ScalingCurve) -> list[str]:
    """The speed-up curve as text, one line for each number of workers, and its knee in a sentence."""
    most = max(point.speedup for point in curve.points)
    lines = ["workers  speed-up  efficiency"]
    for point in curve.points:
        bar = "█" * max(1, round(_BAR * point.speedup / most))
        mark = "  ← knee" if point.workers == curve.knee else ""
        lines.append(f"{point.workers:>7}  {point.speedup:>7.2f}×  {point.efficiency:>9.0%}  {bar}{mark}")
    lines.append(_knee(curve))
    return lines


def _knee(curve: ScalingCurve) -> str:
    last = curve.points[-1].workers
    if len(curve.points) == 1:
        return f"The job fits {last} worker{'s' if last > 1 else ''} here, and no other number."
    if curve.knee == last:
        return (
            f"Up to {last} workers each further one brings at least {curve.least_share:.0%} of an ideal one."
        )
    after = next(point for point in curve.points if point.workers > curve.knee)
    name, lost_s = max(after.eaten_s.items(), key=lambda item: item[1], default=("", 0.0))
    text = f"After {curve.knee} a further worker brings less than {curve.least_share:.0%} of an ideal one"
    if lost_s > 0:
        words = _share_of(after.forecast, lost_s)
        text += f": with {after.workers}, {name.removesuffix('_s')} takes {words} more than its ideal share"
    if curve.turn < last:
        text += f". More than {curve.turn} are slower"
    return text + "."


def _share_of(forecast: Forecast, seconds: float) -> str:
    return f"{seconds * 1e3:.3g} of {forecast.step_s * 1e3:.3g} ms"
