"""The run's events in; terminal display, figures, page and TensorBoard files out. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from paceline.plan.planned import Planned

__all__ = ["write_plan", "write_report"]


def write_report(run_directory: Path) -> Path:
    """Write `report.html` and `figures/*.png` into the run's directory from its `events.jsonl`.

    Works for a run that is still going or that has died. Returns the page's path.

    Raises:
        RunError: there is no `events.jsonl`, or a newer version of paceline wrote it.
    """
    # matplotlib takes about a second to load: only where a page is written
    from paceline.report.figures import drawings
    from paceline.report.page import write_page
    from paceline.report.reader import read_log
    from paceline.report.theme import save_png

    log = read_log(run_directory / "events.jsonl")
    save_png(drawings(log), run_directory / "figures")
    return write_page(log, run_directory)


def write_plan(planned: Planned, directory: Path, notes: Sequence[str] = ()) -> Path:
    """Write `plan.html`, `timeline.png` and, where there are such curves, `speedup.png` and `goal.png`.

    Returns the page's path.

    Args:
        notes: what to know of the numbers before they are read.
    """
    from paceline.report.plan_figures import drawings
    from paceline.report.plan_page import render
    from paceline.report.theme import save_png

    save_png(drawings(planned), directory)
    path = directory / "plan.html"
    path.write_text(render(planned, notes), encoding="utf-8")
    return path
