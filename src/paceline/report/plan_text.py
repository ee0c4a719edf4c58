"""Pictures of a plan in the terminal: the timeline of a step, and the curve with what eats the ideal.

Each kind has a character of its own, so that nothing is lost without colours.
"""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table
from rich.text import Text

from paceline.plan.planned import Planned
from paceline.plan.scaling import ScalingCurve
from paceline.plan.spans import StepTimeline, WorkerSpans
from paceline.report import formats
from paceline.report.span_kinds import CAUSES, EFFICIENT, SPANS, Look

MOST_ROWS = 16
"""Workers in a picture of the terminal."""
_LEAST_SHOWN = 0.0005
"""Share of the time below which a loss is none."""
_LEAST_WIDTH = 20
_BAR_AT = 38
"""Of the curve: characters before its bars."""
_WIDE = 120


def chosen_rows(timeline: StepTimeline, most: int) -> list[WorkerSpans]:
    """At most `most` workers, from the first to the last, at even distances."""
    rows = timeline.workers
    if len(rows) <= most:
        return list(rows)
    return [rows[round(at * (len(rows) - 1) / (most - 1))] for at in range(most)]


def name_of(worker: WorkerSpans) -> str:
    """`worker 3`, or `workers 4–7`."""
    first, last = worker.ranks[0], worker.ranks[-1]
    return f"worker {first}" if first == last else f"workers {first}–{last}"


def timeline_text(timeline: StepTimeline, width: int) -> list[Text]:
    """One line for each worker, time from left to right, with an axis and a legend; at most `width` characters each."""
    rows = chosen_rows(timeline, MOST_ROWS)
    margin = max(len(name_of(row)) for row in rows) + 2
    columns = max(_LEAST_WIDTH, width - margin - 1)
    title = f"A step of {timeline.layout}: {formats.seconds(timeline.step_s)}"
    if len(rows) < len(timeline.workers):
        title += f" ({len(rows)} of {len(timeline.workers)} workers of the pipeline)"
    lines = [Text(title, style="bold")]
    for row in rows:
        line = Text(name_of(row).ljust(margin))
        for kind in cells(row, timeline.step_s, columns):
            line.append(SPANS[kind].block, style=SPANS[kind].style)
        lines.append(line)
    end = formats.seconds(timeline.step_s)
    lines.append(Text(" " * margin + "0" + end.rjust(columns - 1), style="dim"))
    busiest = timeline.workers[timeline.busiest]
    shares = {kind: seconds / timeline.step_s for kind, seconds in busiest.seconds().items()}
    there = {kind for worker in rows for kind in worker.seconds()}
    entries = [(look, shares.get(kind, 0.0)) for kind, look in SPANS.items() if kind in there]
    lines += _legend(entries, width)
    if len(rows) > 1:
        lines.append(Text(f"Shares of {name_of(busiest)}: no other computes longer.", style="dim"))
    return lines


def cells(worker: WorkerSpans, step_s: float, columns: int) -> list[str]:
    """The kind to show in each of `columns` equal parts of a step.

    Of what there is in a part the kind is taken whose time so far is shown least: so short spans come up as often as
    they should, and each kind has its share of the line within about one character.
    """
    part_s = step_s / columns
    owed: dict[str, float] = {}
    shown: list[str] = []
    at = 0
    spans = worker.spans
    for column in range(columns):
        begin_s, end_s = column * part_s, (column + 1) * part_s
        there: set[str] = set()
        while True:
            span = spans[at]
            seconds = min(span.end_s, end_s) - max(span.begin_s, begin_s)
            if seconds > 0:
                owed[span.kind] = owed.get(span.kind, 0.0) + seconds
                there.add(span.kind)
            if span.end_s > end_s or at == len(spans) - 1:
                break
            at += 1
        kind = max(sorted(there), key=lambda kind: owed[kind]) if there else spans[at].kind
        owed[kind] = owed.get(kind, 0.0) - part_s
        shown.append(kind)
    return shown


def marks_of(curve: ScalingCurve) -> dict[str, int]:
    """Names of what is to be marked on the curve, and the numbers of workers."""
    if curve.knee == curve.turn:
        return {"knee and turn": curve.knee}
    return {"knee": curve.knee, "turn": curve.turn}


def causes_of(planned: Planned) -> list[str]:
    """Those that take anything worth showing, in the order in which they are stacked."""
    return [cause for cause in CAUSES if any(lost[cause] >= _LEAST_SHOWN for lost in planned.losses)]


def lost_share(share: float) -> str:
    """`12 %`, or a dash for nothing."""
    return formats.percent(share) if share >= _LEAST_SHOWN else "–"


def curve_text(planned: Planned, width: int) -> list[Text]:
    """A line for each number of workers: the bar is all their time, and shows what of it counts and what is lost."""
    lines = [Text("workers  speed-up         efficiency  what becomes of the workers' time", style="bold")]
    columns = max(_LEAST_WIDTH, min(60, width - _BAR_AT - 17))
    there = causes_of(planned)
    marks = {at: name for name, at in marks_of(planned.curve).items()}
    for point, lost in zip(planned.curve.points, planned.losses, strict=True):
        efficiency = formats.percent(point.efficiency)
        error = f"± {point.speedup_error:.2g}" if point.speedup_error else ""
        line = Text(f"{point.workers:>7}  {point.speedup:>7.2f}× {error:<6}  {efficiency:>10}  ")
        shares = [
            (EFFICIENT, 1 - sum(lost.values())),
            *((look, lost[cause]) for cause, look in CAUSES.items()),
        ]
        for (look, _), length in zip(shares, _lengths([share for _, share in shares], columns), strict=True):
            line.append(look.block * length, style=look.style)
        line.append(f"  ← {marks[point.workers]}" if point.workers in marks else "")
        lines.append(line)
    return [*lines, *_legend([(EFFICIENT, None), *((CAUSES[cause], None) for cause in there)], width)]


def losses_table(planned: Planned, width: int) -> Table:
    """What of the workers' time is lost to each cause; where there is room, the fastest layouts too."""
    there = causes_of(planned)
    has_layouts = width >= _WIDE
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column("workers", justify="right", no_wrap=True)
    for cause in there:
        table.add_column(cause.replace(" ", "\n"), justify="right", no_wrap=True)
    if has_layouts:
        table.add_column("fastest layout", overflow="fold")
    for point, lost in zip(planned.curve.points, planned.losses, strict=True):
        shares = [lost_share(lost[cause]) for cause in there]
        table.add_row(str(point.workers), *shares, *([str(point.forecast.layout)] if has_layouts else []))
    return table


def _lengths(shares: Sequence[float], columns: int) -> list[int]:
    """Whole characters, `columns` together: each bound is rounded."""
    lengths, whole, used = [], 0.0, 0
    for share in shares:
        whole += share
        bound = min(columns, round(whole * columns))
        lengths.append(max(0, bound - used))
        used = max(used, bound)
    return lengths


def _legend(entries: Sequence[tuple[Look, float | None]], width: int) -> list[Text]:
    """Characters and their meaning, with a share where one is given, in lines of at most `width`."""
    lines, line = [], Text()
    for look, share in entries:
        entry = Text(look.block, style=look.style)
        entry.append(f" {look.words}" + ("" if share is None else f" {_share(share)}"), style="not dim")
        if line and len(line) + 3 + len(entry) > width:
            lines.append(line)
            line = Text()
        line = Text.assemble(line, "   ", entry) if line else entry
    return [*lines, line]


def _share(share: float) -> str:
    return "under 0.1 %" if 0 < share < _LEAST_SHOWN else formats.percent(share)
