"""A plan as a page: one HTML file that holds all it needs, and loads nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from paceline.plan.explain import limited_by, why_it_lost
from paceline.plan.links import Link
from paceline.plan.planned import Planned
from paceline.plan.terms import Forecast
from paceline.records import Host
from paceline.report import formats
from paceline.report.goal_page import goal_section
from paceline.report.markup import Cell, document, facts, figure, section, table, text, wrapped
from paceline.report.plan_figures import drawings
from paceline.report.plan_text import causes_of, lost_share, marks_of
from paceline.report.plans import knee_sentence
from paceline.report.theme import Drawing


def render(planned: Planned, notes: Sequence[str] = ()) -> str:
    """The whole page. What comes from the job is escaped.

    Args:
        notes: what to know of the numbers before they are read.
    """
    drawn = {drawing.name: drawing for drawing in drawings(planned)}
    parts = [
        _headline(planned, notes),
        _numbers(planned),
        _layouts(planned),
        section("A step", figure(drawn["timeline"])),
        _curve(planned, drawn),
        _changes(planned),
        "" if planned.goal is None else goal_section(planned.goal, planned.noise_source, drawn.get("goal")),
        _about(planned),
        "<footer>All numbers are forecasts, from plan.json, profile.json and cluster.json beside this page.</footer>",
    ]
    return document(f"{planned.job}: paceline plan", parts)


def _headline(planned: Planned, notes: Sequence[str]) -> str:
    first, *others = planned.advice.sentences
    told = "".join(f'<p class="why">{wrapped(sentence)}</p>' for sentence in others)
    told += "".join(f'<p class="remark">{text(note)}</p>' for note in notes)
    return (
        f'<header><p class="kicker"><span>paceline plan</span></p><h1>{text(planned.job)}</h1>'
        f'<p class="lead">{wrapped(first)}</p>{told}</header>'
    )


def _numbers(planned: Planned) -> str:
    best, curve = planned.found.fastest[0], planned.curve
    tiles = [
        ("time per step", formats.seconds(best.step_s), _error(best)),
        (
            "samples per second",
            formats.number(best.samples_per_s),
            f"batch of {formats.plural(planned.batch_size, 'sample')}",
        ),
    ]
    point = next((point for point in curve.points if point.workers == best.layout.workers), None)
    if point is not None and point is not curve.points[0]:
        against = formats.plural(curve.points[0].workers, "worker")
        efficiency = f"efficiency {formats.percent(point.efficiency)}"
        tiles.append((f"speed against {against}", formats.times(point.speedup), efficiency))
    available = formats.count(planned.linked.cluster.workers)
    tiles.append(("workers", formats.count(best.layout.workers), f"of {available}"))
    tiles.append(("memory of a worker", formats.size(best.memory.own), "of the one that needs most"))
    items = []
    for index, (name, value, aside) in enumerate(tiles):
        told = f'<dd class="aside">{text(aside)}</dd>' if aside else ""
        first = ' class="first"' if index == 0 else ""
        items.append(f'<div{first}><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>{told}</div>')
    return f'<dl class="numbers">{"".join(items)}</dl>'


def _layouts(planned: Planned) -> str:
    found = planned.found
    best, *others = found.fastest
    times = formats.column([forecast.step_s * 1e3 for forecast in found.fastest])
    rows: list[list[str | Cell]] = [
        [
            str(forecast.layout),
            Cell(f"{time} ms", _error(forecast)),
            Cell(formats.number(forecast.samples_per_s)),
            Cell(formats.size(forecast.memory.own)),
            limited_by(forecast),
        ]
        for forecast, time in zip(found.fastest, times, strict=True)
    ]
    head = ("layout", "time per step", "samples/s", "memory of a worker", "limited by")
    reasons = "".join(f"<li>{_reason(forecast, best)}</li>" for forecast in others)
    lost = f'<h3 class="after">Why the others lost</h3><ul class="messages">{reasons}</ul>' if others else ""
    refused = found.smallest
    memory = (
        f" Refused for memory, among others: {refused.layout}, which needs {formats.size(refused.needed_bytes)} of "
        f"{formats.size(refused.room_bytes)}."
        if refused is not None
        else ""
    )
    note = f"The fastest of {formats.plural(found.num_possible, 'layout')}.{memory}"
    return section("Layouts", table(head, rows, chosen=0), lost, note=note)


def _error(forecast: Forecast) -> str:
    return f"± {formats.seconds(forecast.error_s)}" if forecast.error_s else ""


def _reason(loser: Forecast, winner: Forecast) -> str:
    layout = str(loser.layout)
    return f"<b>{wrapped(layout)}</b>{wrapped(why_it_lost(loser, winner).removeprefix(layout))}"


def _curve(planned: Planned, drawn: dict[str, Drawing]) -> str:
    curve, there = planned.curve, causes_of(planned)
    marks = {at: name for name, at in marks_of(curve).items()}
    rows: list[list[str | Cell]] = []
    for point, lost in zip(curve.points, planned.losses, strict=True):
        rows.append(
            [
                Cell(formats.count(point.workers), marks.get(point.workers, "")),
                str(point.forecast.layout),
                Cell(formats.seconds(point.forecast.step_s), _error(point.forecast)),
                Cell(
                    formats.times(point.speedup),
                    f"± {point.speedup_error:.2g}" if point.speedup_error else "",
                ),
                Cell(formats.percent(point.efficiency)),
                *(Cell(lost_share(lost[cause])) for cause in there),
            ]
        )
    head = ("workers", "fastest layout", "time per step", "speed-up", "efficiency", *there)
    picture = figure(drawn["speedup"]) if "speedup" in drawn else ""
    return section("What more workers bring", picture, table(head, rows), note=knee_sentence(planned))


def _changes(planned: Planned) -> str:
    rows: list[list[str | Cell]] = [
        [change.what, Cell(formats.times(change.factor)), str(change.layout)]
        for change in planned.advice.changes
    ]
    note = "Each change alone, forecast with all layouts anew: samples per second over those of the plan."
    return (
        section("What would help", table(("change", "speed", "fastest layout"), rows), note=note)
        if rows
        else ""
    )


def _about(planned: Planned) -> str:
    linked = planned.linked
    speeds = linked.speeds or (1.0,) * len(linked.cluster.hosts)
    hosts = Counter(_host(host, speed) for host, speed in zip(linked.cluster.hosts, speeds, strict=True))
    told = "<br>".join(
        text(f"{number} hosts, each {host}" if number > 1 else host) for host, number in hosts.items()
    )
    pairs = [("hosts", told)]
    if linked.cluster.workers > 1:
        pairs.append(("within a host", _links(linked.within_of or (linked.within,))))
    if linked.between is not None:
        pairs.append(("between hosts", _links(linked.between_of or (linked.between,))))
    pairs.append(("batch", text(formats.plural(planned.batch_size, "sample"))))
    return section("The cluster", facts(pairs))


def _host(host: Host, speed: float) -> str:
    told = f"{host.device_name}, {formats.plural(host.cores, 'core')}, {formats.size(host.memory_bytes)} of memory"
    told += f", {formats.plural(host.workers, 'worker')}"
    return told if speed == 1 else f"{told}, {speed:.3g} times as fast as what was measured"


def _links(links: Sequence[Link]) -> str:
    return "<br>".join(dict.fromkeys(text(_link(link)) for link in links))


def _link(link: Link) -> str:
    measured = ", measured" if link.measured else ""
    return f"{link.name}: {formats.seconds(link.latency_s)}, {formats.size(link.bytes_per_s)}/s{measured}"
