from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from paceline.report import terminal
from paceline.report.reader import read_log
from paceline.report.terminal import (
    Display,
    PlainDisplay,
    QuietDisplay,
    RichDisplay,
    make_display,
    print_summary,
)


def _console(**options: Any) -> Console:
    return Console(file=io.StringIO(), width=120, **options)


def _text(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def _show(display: Display, events: list[dict[str, Any]]) -> None:
    for event in events:
        display.on_event(event)
    display.close()


def test_plain_lines(run_events: Callable[..., Any]) -> None:
    console = _console()
    _show(PlainDisplay(console), run_events("finished"))
    lines = _text(console).splitlines()
    assert lines[:9] == [
        "shakespeare · 4,821,504 parameters · batch of 64 samples · 800 steps (4 epochs) · fp32",
        "birch: AMD EPYC 7B13, 2 cores",
        "measured in 11.5 s: 1,098 layouts forecast, the fastest dp_replicate=2,threads=1 with 250 ms ± 20 ms",
        "timed 1 worker × 1 thread: 400 ms per step (396 ms – 421 ms), 20,480 tokens/s",
        "timed 2 workers × 1 thread: 234 ms per step (231 ms – 238 ms), 35,009 tokens/s, 1.71×",
        "timed 1 worker × 2 threads: 284 ms per step (279 ms – 302 ms), 28,845 tokens/s, 1.41×",
        "layout: 2 workers × 1 thread",
        "2 workers × 1 thread is the fastest of the three layouts that were timed on this job.",
        "2 workers compute the same loss and gradients as one: largest difference 3e-7.",
    ]
    assert lines[9] == "held out before training: loss 4.2, accuracy 0.015, bits_per_byte 6.059"
    assert lines[10].startswith("step 1/800 (0.1 %)  loss 4.")
    assert "computation 84 %, communication 9 %, data 1 %" in lines[10]
    assert lines[10].endswith("left")
    assert any(line.startswith("held out after step 400: loss 1.6") for line in lines)
    assert "warning: Other programs keep 12 % of the cores busy: times may vary." in lines
    assert lines[-2].startswith("step 800/800 (100 %)")
    assert not lines[-2].endswith("left")
    assert lines[-1].startswith("finished after 800 steps in 3 min 9 s, 34,")


def test_plain_lines_come_every_five_seconds_or_tenth_of_the_run(run_events: Callable[..., Any]) -> None:
    console = _console()
    _show(PlainDisplay(console), run_events("finished"))  # about 190 s, 237 ms a step
    told = [line for line in _text(console).splitlines() if line.startswith("step ")]
    assert 35 <= len(told) <= 50
    fast = run_events("finished")
    for event in fast:
        event["time_s"] = 0.0
    console = _console()
    _show(PlainDisplay(console), fast)
    told = [line.split()[1] for line in _text(console).splitlines() if line.startswith("step ")]
    assert told == [f"{n}/800" for n in (1, *range(81, 722, 80), 800)]


def test_what_the_run_says_is_not_markup_and_not_broken_into_lines(run_events: Callable[..., Any]) -> None:
    console = _console()
    events = run_events("one_step")
    text = "[bold]not markup[/bold] [/nor this] " + "word " * 60 + "end"
    events.insert(5, {"event": "message", "time_s": 1.0, "level": "info", "text": text})
    _show(PlainDisplay(console), events)
    assert text in _text(console).splitlines()


def test_a_failed_run_and_a_failed_trial(run_events: Callable[..., Any]) -> None:
    console = _console()
    _show(PlainDisplay(console), run_events("failed"))
    assert _text(console).splitlines()[-1].startswith("failed after 90 steps in 21")
    console = _console()
    trial = {
        "event": "trial",
        "time_s": 1.0,
        "label": "2 × 1",
        "workers": 2,
        "threads": 1,
        "error": "no memory",
    }
    PlainDisplay(console).on_event(trial)
    assert _text(console) == "timed 2 × 1: could not be timed: no memory\n"


def test_a_loss_that_is_not_finite_is_shown(run_events: Callable[..., Any]) -> None:
    console = _console()
    _show(PlainDisplay(console), run_events("not_finite"))
    assert "loss NaN" in _text(console)


def test_quiet_tells_warnings_only(run_events: Callable[..., Any]) -> None:
    console = _console()
    _show(QuietDisplay(console), run_events("finished"))
    assert _text(console) == "warning: Other programs keep 12 % of the cores busy: times may vary.\n"


@pytest.fixture
def slow_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each look at the clock finds a hundredth of a second gone."""

    def ticks() -> Iterator[float]:
        now = 0.0
        while True:
            now += 0.01
            yield now

    clock = ticks()
    monkeypatch.setattr(terminal.time, "monotonic", lambda: next(clock))


@pytest.mark.usefixtures("slow_clock")
def test_live_display_refreshes_at_most_twice_a_second(run_events: Callable[..., Any]) -> None:
    console = _console(force_terminal=True, color_system=None)
    drawn = 0
    display = RichDisplay(console)
    render = display._live._get_renderable

    def count() -> Any:
        nonlocal drawn
        drawn += 1
        assert render is not None
        return render()

    display._live._get_renderable = count
    _show(display, [event for event in run_events("finished") if event["event"] == "step"])
    assert 8.01 // 0.5 <= drawn <= 2 * (8.01 / 0.5) + 6  # rich may render once more at start and stop
    text = _text(console)
    assert "step 1/800" not in text  # no total is known without the `run` event
    assert "loss " in text
    assert "samples/s" in text
    assert "computation 84 %" in text


def test_live_display_shows_layout_metrics_and_time_left(run_events: Callable[..., Any]) -> None:
    console = _console(force_terminal=True, color_system=None)
    display = RichDisplay(console)
    events = run_events("finished")
    for event in events[:121]:
        display.on_event(event)
    display._live.refresh()
    text = _text(console)
    assert "shakespeare · 4,821,504 parameters" in text
    assert "timed 2 workers × 1 thread" in text
    assert "step 112/800 (14 %)  2 min 4" in text
    assert "held out after step 100: loss 2.7" in text
    assert "tokens/s   computation 84 %, communication 9 %, data 1 %   2 workers × 1 thread" in text
    _show(display, events[121:])
    assert "finished after 800 steps" in _text(console)
    assert not display._live.is_started


def test_the_display_fits_the_console() -> None:
    assert isinstance(make_display(_console()), PlainDisplay)
    assert isinstance(make_display(_console(force_terminal=True)), RichDisplay)
    assert isinstance(make_display(_console(force_terminal=True), quiet=True), QuietDisplay)


def test_summary_of_a_finished_run(write_run: Callable[..., Path]) -> None:
    console = Console(file=io.StringIO(), width=400)
    path = write_run("finished")
    (path.parent / "report.html").touch()
    print_summary(console, read_log(path))
    text = _text(console)
    for words in (
        "shakespeare: finished",
        "800 in 3 min 9 s of training, 3 min 42 s in all",
        "270.2 samples/s, 34,584 tokens/s",
        "2 workers × 1 thread train 1.71× as fast as 1 worker × 1 thread",
        "The missing 0.29: communication takes 9 % of a step",
        "computation 86 %, communication 8 %, data 1 %, optimizer 4 %, other 1 %",
        "measured, 250 ms ± 20 ms forecast (−5 %), 234 ms by trial (+1 %)",
        str(path.parent / "weights.safetensors"),
        str(path.parent / "report.html"),
    ):
        assert words in text


def test_summary_of_a_failed_run_leaves_the_error_to_the_command(write_run: Callable[..., Path]) -> None:
    console = _console()
    print_summary(console, read_log(write_run("failed")))
    text = _text(console)
    assert "shakespeare: failed" in text
    assert "rank 1 died with signal 9" not in text
    assert "report.html" not in text


@pytest.mark.parametrize("name", ["explicit", "one_step", "not_finite", "hostile"])
def test_summary_of_other_runs(write_run: Callable[..., Path], name: str) -> None:
    console = _console()
    print_summary(console, read_log(write_run(name)))
    assert "steps" in _text(console)
