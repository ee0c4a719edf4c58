"""The report: one HTML file that holds all it needs, and loads nothing."""

from __future__ import annotations

import datetime
from pathlib import Path

from paceline.report import sections
from paceline.report.analysis import compare
from paceline.report.figures import drawings
from paceline.report.forecasts import forecasts, replans
from paceline.report.markup import document, text
from paceline.report.reader import RunLog


def write_page(log: RunLog, directory: Path) -> Path:
    """Write `report.html` into `directory` and return its path."""
    path = directory / "report.html"
    path.write_text(render(log), encoding="utf-8")
    return path


def render(log: RunLog) -> str:
    """The whole page. What the run said is escaped."""
    comparison = compare(log)
    drawn = {drawing.name: drawing for drawing in drawings(log)}
    body = [
        sections.headline(log, comparison),
        sections.key_numbers(log, comparison),
        sections.loss(drawn),
        forecasts(log),
        sections.layouts(log, comparison, drawn),
        replans(log),
        sections.proof(log),
        sections.time_per_rank(log, drawn),
        sections.batch_size(log),
        sections.held_out(log, drawn),
        sections.showcase(log),
        sections.about(log),
        sections.messages(log),
        _footer(log),
    ]
    return document(f"{log.name}: paceline run", body)


def _footer(log: RunLog) -> str:
    start = log.run.time_s if log.run else None
    if start is None:
        return ""
    when = datetime.datetime.fromtimestamp(start, tz=datetime.UTC)
    source = f"All figures and numbers are from {text(log.path.name)}."
    return f"<footer>Run started {when:%Y-%m-%d %H:%M} UTC. {source}</footer>"
