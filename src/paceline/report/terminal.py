"""A run in the terminal while it goes: live where there is a terminal, plain lines elsewhere."""

from __future__ import annotations

import abc
import time
from typing import Any, final

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from paceline.report import formats
from paceline.report.kinds import (
    EndEvent,
    EvaluationEvent,
    Event,
    ForecastsEvent,
    MessageEvent,
    ModelEvent,
    PlanEvent,
    ReplanEvent,
    RunEvent,
    StepEvent,
    TrialEvent,
    decode,
)
from paceline.report.sentences import how_forecast, how_replanned
from paceline.report.summary import print_summary
from paceline.report.tracker import Tracker

__all__ = ["Display", "PlainDisplay", "QuietDisplay", "RichDisplay", "make_display", "print_summary"]

_REFRESH_EVERY_S = 0.5
_LINE_EVERY_S = 5.0
_LINE_EVERY_SHARE = 0.1


class Display(abc.ABC):
    """Shows a run's events as they come. Not for several threads at once."""

    @abc.abstractmethod
    def on_event(self, event: dict[str, Any]) -> None:
        """Take one event of `events.jsonl`."""

    @abc.abstractmethod
    def close(self) -> None:
        """Leave the terminal as it was; the display takes no more events."""


def make_display(console: Console, quiet: bool = False) -> Display:
    """The display that fits the console: live in a terminal, plain lines in a file or a pipe."""
    if quiet:
        return QuietDisplay(console)
    return RichDisplay(console) if console.is_terminal else PlainDisplay(console)


@final
class QuietDisplay(Display):
    """Warnings only."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def on_event(self, event: dict[str, Any]) -> None:
        read = decode(event)
        if isinstance(read, MessageEvent) and read.level == "warning":
            _say(self._console, f"warning: {read.text}", "yellow")

    def close(self) -> None:
        pass


@final
class PlainDisplay(Display):
    """A line for each thing that happens; for steps, one every five seconds and at each tenth of the run.

    Seconds are those of the events: the same events give the same lines.
    """

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tracker = Tracker()
        self._told_s = float("-inf")
        self._told_share = 0.0
        self._told_step = 0

    def on_event(self, event: dict[str, Any]) -> None:
        read = decode(event)
        if read is None:
            return
        self._tracker.take(read)
        if isinstance(read, StepEvent):
            self._on_step(read)
            return
        if isinstance(read, EndEvent):
            self._tell_progress(read.time_s)
        for line, style in _lines(self._tracker, read):
            _say(self._console, line, style)

    def close(self) -> None:
        pass

    def _on_step(self, step: StepEvent) -> None:
        share = self._tracker.share_done
        tenth = share is not None and share >= self._told_share + _LINE_EVERY_SHARE - 1e-9
        if step.time_s >= self._told_s + _LINE_EVERY_S or tenth:
            self._tell_progress(step.time_s)

    def _tell_progress(self, now_s: float) -> None:
        tracker = self._tracker
        if tracker.step is None or tracker.step.step == self._told_step:
            return
        told = [
            tracker.progress(),
            f"loss {formats.number(tracker.step.loss)}",
            tracker.pace(),
            tracker.shares(),
        ]
        if (left := tracker.time_left()) and left != "0 s":
            told.append(f"{left} left")
        _say(self._console, "  ".join(filter(None, told)))
        self._told_s, self._told_share = now_s, tracker.share_done or 0.0
        self._told_step = tracker.step.step


@final
class RichDisplay(Display):
    """A progress bar with the latest numbers below it; everything else is printed above."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._tracker = Tracker()
        self._refreshed_s = float("-inf")
        # refreshed by hand from `on_event`: no second thread, and no work while nothing happens
        self._live = Live(get_renderable=self._render, console=console, auto_refresh=False, transient=True)

    def on_event(self, event: dict[str, Any]) -> None:
        read = decode(event)
        if read is None:
            return
        self._tracker.take(read)
        if isinstance(read, StepEvent):
            self._refresh()
            return
        if isinstance(read, EndEvent):
            self.close()
        for line, style in _lines(self._tracker, read):
            _say(self._console, line, style)

    def close(self) -> None:
        self._live.stop()

    def _refresh(self) -> None:
        if not self._live.is_started:
            self._live.start()
        now_s = time.monotonic()
        if now_s >= self._refreshed_s + _REFRESH_EVERY_S:
            self._refreshed_s = now_s
            self._live.refresh()

    def _render(self) -> RenderableType:
        tracker = self._tracker
        if tracker.step is None:
            return Text()
        bar = Table.grid(padding=(0, 1), expand=True)
        bar.add_column(ratio=1)
        bar.add_column(no_wrap=True)
        left = tracker.time_left()
        bar.add_row(
            ProgressBar(
                total=tracker.total_steps or 1.0, completed=tracker.step.step if tracker.total_steps else 0
            ),
            Text(tracker.progress() + (f"  {left} left" if left else ""), style="bold"),
        )
        numbers = Text(f"loss {formats.number(tracker.step.loss)}", style="bold")
        if tracker.evaluation:
            numbers.append(f"   {tracker.held_out(tracker.evaluation)}", style="not bold")
        pace = [tracker.pace(), tracker.shares(), tracker.plan.label if tracker.plan else ""]
        return Group(bar, numbers, Text("   ".join(filter(None, pace)), style="dim"))


def _lines(tracker: Tracker, event: Event) -> list[tuple[str, str]]:
    """What to print for an event that is no step, each line with its style."""
    if isinstance(event, RunEvent):
        first, *others = tracker.start()
        return [(first, "bold"), *((line, "dim") for line in others)]
    if isinstance(event, ModelEvent):
        return [(formats.plural(event.parameters, "parameter"), "dim")]
    if isinstance(event, ForecastsEvent):
        return [(how_forecast(event), "dim")]
    if isinstance(event, TrialEvent):
        return [(f"timed {tracker.trial(event)}", "" if event.step_s else "yellow")]
    if isinstance(event, PlanEvent):
        return [(f"layout: {event.label}", "bold"), *([(event.reason, "")] if event.reason else [])]
    if isinstance(event, ReplanEvent):
        return [(how_replanned(event), "bold" if event.changed else "")]
    if isinstance(event, EvaluationEvent):
        return [(tracker.held_out(event), "cyan")]
    if isinstance(event, MessageEvent):
        warning = event.level == "warning"
        return [(f"warning: {event.text}" if warning else event.text, "yellow" if warning else "")]
    if isinstance(event, EndEvent):
        told = (
            f"{event.status} after {formats.plural(event.steps, 'step')} in {formats.seconds(event.train_s)}"
        )
        if event.samples_per_s is not None:
            told += f", {tracker.speed(event.samples_per_s)}"
        return [(told, "bold red" if event.status == "failed" else "bold")]
    return []


def _say(console: Console, line: str, style: str = "") -> None:
    """Print text as it is: what comes from the run is not read as markup, and lines are not broken."""
    console.print(Text(line, style=style), soft_wrap=True)
