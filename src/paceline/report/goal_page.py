"""Time and cost to a target, as a section of a plan's page."""

from __future__ import annotations

from paceline.plan.goal import GoalCurve, GoalPoint
from paceline.report import formats
from paceline.report.goals import critical_batch, goal_lines
from paceline.report.markup import Cell, figure, section, table, text
from paceline.report.theme import Drawing


def goal_section(curve: GoalCurve, source: str, drawn: Drawing | None) -> str:
    """The picture, the best batch size for each number of workers, and what that says.

    Args:
        source: where the noise scale is from.
    """
    has_price = curve.price_per_worker_hour is not None
    head = ["workers", "batch", "time per step", "samples/s", "efficiency", "time", "cost"]
    head += ["price of 1 M samples"] * has_price + ["layout"]
    rows = [_row(point) for point in curve.points]
    first, *others = goal_lines(curve)
    note = " ".join(filter(None, (critical_batch(curve, source), first)))
    remarks = "".join(f'<p class="remark">{text(line)}</p>' for line in others)
    numbers = [point.workers for point in curve.points]
    picture = "" if drawn is None else figure(drawn)
    told = table(head, rows, chosen=numbers.index(curve.fastest))
    return section("Time to a target", picture, told, remarks, note=note)


def _row(point: GoalPoint) -> list[str | Cell]:
    best, forecast = point.best, point.best.forecast
    row: list[str | Cell] = [
        Cell(formats.count(point.workers)),
        Cell(formats.count(forecast.samples) + ("*" if best.is_beyond else "")),
        Cell(
            formats.seconds(forecast.step_s),
            f"± {formats.seconds(forecast.error_s)}" if forecast.error_s else "",
        ),
        Cell(formats.number(forecast.samples_per_s)),
        Cell("–" if best.efficiency is None else formats.percent(best.efficiency)),
        Cell(f"{best.time:.3f}", f"± {best.time_error:.2g}" if best.time_error else ""),
        Cell(f"{point.cost:.3f}"),
    ]
    if point.price_per_million is not None:
        row.append(Cell(formats.number(point.price_per_million)))
    return [*row, str(forecast.layout)]
