"""A plan in the terminal: the fastest layouts, why the others lost, a step of the winner, what more workers bring."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.planned import Planned
from paceline.report import formats
from paceline.report.plan_text import curve_text, losses_table, timeline_text

_NUMBERS_WIDTH = 38
"""Of the table's columns with numbers, and what is between all columns."""
_SENT_WIDTH = 11


def print_plan(console: Console, planned: Planned, notes: Sequence[str] = ()) -> None:
    """The ranked table, a reason for each layout that lost, the winner's step, the speed-up curve, and the advice.

    Args:
        notes: what to know of the numbers before they are read.
    """
    for note in notes:
        console.print(Text(note))
    if notes:
        console.print()
    found, width = planned.found, console.width
    console.print(
        Text(
            f"The fastest of {found.num_possible:,} layouts, by forecast, and the memory of a worker",
            style="bold",
        )
    )
    console.print(_ranking(planned, width))
    console.print()
    for forecast in found.fastest[1:]:
        console.print(Text(why_it_lost(forecast, found.fastest[0])))
    console.print()
    for line in timeline_text(planned.timeline, width):
        console.print(line)
    console.print()
    if len(planned.curve.points) > 1:
        for line in curve_text(planned, width):
            console.print(line)
        console.print()
        console.print(Text("Of the workers' time there is lost to", style="bold"))
        console.print(losses_table(planned, width))
        console.print()
    console.print(Text(knee_sentence(planned)))
    console.print()
    for sentence in planned.advice.sentences:
        console.print(Text(sentence))


def _ranking(planned: Planned, width: int) -> Table:
    found, sent = planned.found, planned.sent_bytes
    limits = [limited_by(forecast) for forecast in found.fastest]
    longest = max(len(str(forecast.layout)) for forecast in found.fastest)
    # Where there is no room for what limits a layout, the reasons below the table say it.
    room = width - longest - _NUMBERS_WIDTH
    if room < _SENT_WIDTH:
        sent = ()
    has_limits = room >= _SENT_WIDTH * bool(sent) + max(map(len, limits))
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("layout", overflow="fold")
    for name in ("step, ms\n± error", "samples/s", "MiB", *(["a host\nsends, MB"] if sent else [])):
        table.add_column(name, justify="right", no_wrap=True)
    if has_limits:
        table.add_column("limited by")
    for at, (forecast, limit) in enumerate(zip(found.fastest, limits, strict=True)):
        table.add_row(
            str(forecast.layout),
            f"{forecast.step_s * 1e3:.4g} ± {forecast.error_s * 1e3:.2g}",
            f"{forecast.samples_per_s:.4g}",
            f"{forecast.memory.own / 2**20:,.0f}",
            *([f"{sent[at] / 1e6:.3g}"] if sent else []),
            *([limit] if has_limits else []),
        )
    return table


def knee_sentence(planned: Planned) -> str:
    """Where the knee is, what takes the time after it, and where it turns."""
    curve = planned.curve
    last = curve.points[-1].workers
    if len(curve.points) == 1:
        return f"The job can use {formats.plural(last, 'worker')} here, and no other number."
    share = formats.percent(curve.least_share)
    if curve.knee == last:
        return f"Up to {last} workers each further one brings at least {share} of an ideal one."
    told = (
        f"After {formats.plural(curve.knee, 'worker')} a further one brings less than {share} of an ideal one"
    )
    after = next(at for at, point in enumerate(curve.points) if point.workers > curve.knee)
    lost = planned.losses[after]
    cause = max(lost, key=lambda name: lost[name])
    if lost[cause] > 0:
        number = curve.points[after].workers
        told += f": with {number}, {formats.percent(lost[cause])} of their time goes to {cause}"
    return told + (f". More than {curve.turn} are slower." if curve.turn < last else ".")
