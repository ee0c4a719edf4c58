from __future__ import annotations

import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from paceline.report import write_report
from paceline.report.figures import drawings
from paceline.report.page import render, write_page
from paceline.report.reader import RunLog, read_log
from paceline.report.theme import DARK, LIGHT, Size, to_svg

VOID = {"meta", "br", "wbr", "img", "link", "hr", "input"}


class _Outline(HTMLParser):
    """Collects tags, attributes, text and headings; fails where tags are not closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.ids: list[str] = []
        self.attributes: set[str] = set()
        self.text = ""
        self.headings: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        self.ids += [value or "" for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "h2":
            self.headings.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] == "h2":
            self.headings[-1] += data


def _outline(page: str) -> _Outline:
    outline = _Outline()
    outline.feed(page)
    assert outline.open == []
    return outline


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory, all_runs: dict[str, Any]) -> dict[str, str]:
    """Every made-up run's page: drawn once, looked at by many tests."""
    found = {}
    for name in NAMES:
        path = all_runs[name](tmp_path_factory.mktemp(name) / "events.jsonl")
        found[name] = write_page(read_log(path), path.parent).read_text()
    return found


NAMES = ["finished", "explicit", "failed", "hostile"]


@pytest.mark.parametrize("name", NAMES)
def test_the_page_stands_alone(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    outline = _outline(page)
    assert not outline.tags & {"script", "link", "img", "iframe", "object", "embed", "image", "base"}
    assert not {a for a in outline.attributes if a.startswith("on")} | (
        outline.attributes & {"src", "srcset"}
    )
    for loads in ("http:", "https:", "@import", "@font-face", "src=x onerror=alert(2)>"):
        assert loads not in page
    assert re.findall(r"url\((?!#)", page) == []
    assert re.findall(r'href="(?!#)', page) == []
    assert "default-src 'none'" in page


@pytest.mark.parametrize("name", NAMES)
def test_ids_are_unique_and_referred_to_rightly(pages: dict[str, str], name: str) -> None:
    ids = _outline(pages[name]).ids
    assert len(ids) == len(set(ids)) > 0
    referred = re.findall(r'(?:url\(|href=")#([\w-]+)', pages[name])
    assert referred
    assert set(referred) <= set(ids)


@pytest.mark.parametrize("name", NAMES)
def test_colours_are_the_pages_own(pages: dict[str, str], name: str) -> None:
    page = pages[name]
    body = page[page.index("<body>") :]
    assert re.findall(r"(?:fill|stroke|color): ?#\w+", body) == []
    used = set(re.findall(r"var\(--([\w-]+)\)", page))
    defined = set(re.findall(r"--([\w-]+):", page))
    assert used <= defined
    assert {"ink", "computation"} <= used
    assert LIGHT.keys() == DARK.keys()
    assert len(set(LIGHT.values())) == len(LIGHT)


def test_sections_of_a_finished_run(pages: dict[str, str]) -> None:
    outline = _outline(pages["finished"])
    assert outline.headings == [
        "Loss", "Forecasts", "Layouts measured", "Where a step's time goes", "Held-out metrics",
        "What the trained model does", "The run", "Messages",
    ]  # fmt: skip
    text = outline.text.replace("\u00a0", " ")
    for words in (
        "2 workers × 1 thread train 1.71× as fast as 1 worker × 1 thread",
        "1.68× to 1.81× over the rounds",
        "forecast 250 ms: −5 %",
        "measured in 11.5 s: 1,098 layouts forecast, the fastest dp_replicate=2,threads=1 with 250 ms ± 20 ms",
        "Dashed line: 2 times that, the ideal.",
        "Of all workers' time, 86 % is computation",
        "What say you, cousin, to this heavy news\n",
        "width=256",
        "paceline train examples/text.py --set width=256",
        "Warning. Other programs keep 12 % of the cores busy",
        "AMD EPYC 7B13, 2 cores, 24 GiB of memory",
    ):
        assert words in text


def test_sections_without_data_are_left_out(pages: dict[str, str]) -> None:
    assert _outline(pages["explicit"]).headings == [
        "Loss", "Layout", "Where a step's time goes", "Held-out metrics", "The run",
    ]  # fmt: skip
    failed = _outline(pages["failed"])
    assert failed.headings[0] == "The run failed"
    assert "rank 1 died with signal 9\nLikely cause: out of memory" in failed.text


def test_a_loss_that_is_not_finite_is_told_and_drawn(write_run: Callable[..., Path]) -> None:
    loss = drawings(read_log(write_run("not_finite")))[0]
    assert "The training loss is not finite at 60 steps, first at step 61 (dashed line)." in loss.caption
    dashed = [line for line in loss.figure(Size.NARROW).axes[0].lines if line.get_linestyle() == "--"]
    assert [line.get_xdata()[0] for line in dashed] == [61]


def test_what_the_run_says_is_escaped(pages: dict[str, str]) -> None:
    page = pages["hostile"]
    assert "<script>" not in page
    assert "<img" not in page
    assert _outline(page).text.count("<script>alert(1)</script>") > 10
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page


def test_a_run_that_has_hardly_begun(write_run: Callable[..., Path], run_events: Callable[..., Any]) -> None:
    events = run_events("finished")
    for number in (0, 1, 2, 5):
        page = render(read_log(write_run(events[:number])))
        assert "The run has not ended" in _outline(page).text


def test_lines_that_could_not_be_read_are_told() -> None:
    page = render(RunLog(Path("run/events.jsonl"), unread=("line 3: not a JSON object",) * 5))
    assert "5 lines of events.jsonl could not be read: line 3: not a JSON object" in page


def test_long_runs_stay_small(write_run: Callable[..., Path], run_events: Callable[..., Any]) -> None:
    step = next(event for event in run_events("one_step") if event["event"] == "step")
    steps = [
        {**step, "step": n, "elapsed_s": n * 0.1, "loss": 1 + (n * 7919 % 1000) / n} for n in range(1, 8001)
    ]
    log = read_log(write_run([run_events("one_step")[0], *steps]))
    loss = drawings(log)[0]
    svg = to_svg(loss, Size.WIDE)
    assert len(svg) < 80_000
    assert max(path.count("\nL ") for path in re.findall(r'd="([^"]*)"', svg)) <= 1000


def test_write_report_writes_page_and_figures(write_run: Callable[..., Path]) -> None:
    path = write_run("one_step")
    page = write_report(path.parent)
    assert page == path.parent / "report.html"
    _outline(page.read_text())
    figures = sorted((path.parent / "figures").iterdir())
    assert [figure.name for figure in figures] == [
        "held_out_metrics.png", "layouts.png", "loss_by_step.png", "loss_by_time.png", "time_per_rank.png",
    ]  # fmt: skip
    for figure in figures:
        data = figure.read_bytes()
        assert data.startswith(b"\x89PNG\r\n\x1a\n")
        assert data.endswith(b"IEND\xaeB`\x82")
        assert int.from_bytes(data[16:20], "big") == 7.2 * 200


def test_the_same_log_gives_the_same_figure(write_run: Callable[..., Path]) -> None:
    first, again = (drawings(read_log(write_run("one_step")))[0] for _ in range(2))
    assert to_svg(first, Size.NARROW) == to_svg(again, Size.NARROW)


def _contrast(first: str, second: str) -> float:
    """WCAG 2: (L1 + 0.05) / (L2 + 0.05), L the relative luminance."""

    def luminance(colour: str) -> float:
        channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    high, low = sorted((luminance(first), luminance(second)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("colours", [LIGHT, DARK], ids=["light", "dark"])
def test_text_can_be_read(colours: dict[str, str]) -> None:
    assert _contrast(colours["ink"], colours["paper"]) >= 7
    assert _contrast(colours["muted"], colours["paper"]) >= 4.5
    for part in ("computation", "communication", "data", "optimizer", "other"):
        assert _contrast(colours[part], colours["label"]) >= 4.5, part
        assert _contrast(colours[part], colours["paper"]) >= 3, part
