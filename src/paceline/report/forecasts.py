"""What the planner forecast for a run, and what came of it."""

from __future__ import annotations

import statistics

from paceline.records import Layout
from paceline.report import formats
from paceline.report.analysis import forecast_and_measured_s
from paceline.report.markup import Cell, section, table, text
from paceline.report.reader import RunLog
from paceline.report.sentences import how_forecast, how_replanned, name_of, step_against_forecast

_ROWS = 6


def replans(log: RunLog) -> str:
    """The section: what became of the layout while the run trained."""
    if not log.replans:
        return ""
    items = "".join(f"<li>{text(how_replanned(event))}</li>" for event in log.replans)
    return section("The layout reconsidered", f'<ul class="messages">{items}</ul>')


def forecasts(log: RunLog) -> str:
    """The section: the fastest forecasts beside what was timed."""
    event = log.forecasts
    if event is None or not event.forecasts:
        return ""
    timed = {
        str(Layout.from_json(trial.layout)): statistics.median(trial.step_s)
        for trial in log.trials
        if trial.step_s
    }
    measured_s = forecast_and_measured_s(log)[1]
    rows: list[list[str | Cell]] = []
    chosen = None
    for number, forecast in enumerate(event.forecasts[:_ROWS]):
        name = name_of(forecast)
        is_chosen = log.plan is not None and log.plan.layout == forecast.layout
        if is_chosen:
            chosen = number
        rows.append(
            [
                name,
                formats.seconds(forecast.step_s),
                formats.seconds(forecast.error_s),
                formats.seconds(timed[name]) if name in timed else "",
                formats.seconds(measured_s) if is_chosen and measured_s else "",
                f"{forecast.terms.get('compute_s', 0.0) / forecast.step_s:.0%}",
                f"{sum(forecast.memory.values()) / 2**20:,.0f} MiB",
            ]
        )
    head = ("layout", "forecast", "±", "timed before", "trained with", "computation", "memory per worker")
    note = f"The job and the machine were {how_forecast(event)}. {step_against_forecast(log).capitalize()}."
    return section("Forecasts", table(head, rows, chosen=chosen), note=note)
