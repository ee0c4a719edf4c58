"""The sections of the page, each a function of the run's log; one without data is left out."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence

from paceline.report import formats
from paceline.report.analysis import (
    PARTS,
    Comparison,
    Measured,
    RankTime,
    Spread,
    forecast_and_measured_s,
    last_metrics,
    mean_shares,
    rank_times,
    samples_per_s,
)
from paceline.report.kinds import Host
from paceline.report.markup import Cell, facts, figure, section, table, text, verbatim
from paceline.report.noise import noise_sentence
from paceline.report.proofs import verdict
from paceline.report.reader import RunLog
from paceline.report.sentences import result, why_not_more
from paceline.report.theme import Drawing

_MOST_ROWS = 12


def headline(log: RunLog, comparison: Comparison) -> str:
    good = {"finished": "good", "target reached": "good", "failed": "bad", "interrupted": "bad"}
    status = f'<span class="status {good.get(log.status, "")}">{text(log.status)}</span>'
    told = [text("paceline run"), status]
    if log.run and log.run.job_file:
        told.append(text(log.run.job_file))
    html = f'<header><p class="kicker">{"".join(f"<span>{t}</span>" for t in told)}</p>'
    html += f"<h1>{text(log.name)}</h1>"
    if log.end and log.end.error:
        title = f"<h2>The run {text(log.status)}</h2>"
        html += f'<div class="error" role="alert">{title}{verbatim(log.end.error)}</div>'
    html += f'<p class="lead">{text(result(log, comparison))}</p>'
    why = why_not_more(log, comparison)
    html += f'<p class="why">{text(why)}</p>' if why else ""
    if log.status == "unfinished":
        html += '<p class="why">The run has not ended: it is still going, or it died without a word.</p>'
    return html + "</header>"


def key_numbers(log: RunLog, comparison: Comparison) -> str:
    tiles: list[tuple[str, str, str]] = []
    chosen = comparison.chosen
    if chosen and chosen.speedup and chosen is not comparison.unit:
        low, high = formats.times(chosen.speedup.low), formats.times(chosen.speedup.high)
        aside = f"{low} to {high} over the rounds" if low != high else ""
        tiles.append(("speed against one worker", formats.times(chosen.speedup.median), aside))
    tiles += _progress_tiles(log)
    speed = samples_per_s(log)
    if speed is not None:
        tokens = log.run.tokens_per_sample if log.run else None
        aside = f"{formats.number(speed * tokens)} tokens" if tokens else ""
        tiles.append(("samples per second", formats.number(speed), aside))
    evaluated = log.evaluations[-1].metrics if log.evaluations else {}
    for name, last in list(last_metrics(log).items())[:4]:
        title = f"held-out {name}" if name in evaluated else name
        tiles.append((title, formats.number(last), _first_value(log, name)))
    forecast, measured = forecast_and_measured_s(log)
    if log.plan and log.plan.planned_step_s:
        forecast = log.plan.planned_step_s
    if forecast and measured:
        aside = f"forecast {formats.seconds(forecast)}: {formats.signed_percent(measured / forecast - 1)}"
        tiles.append(("time per step, median", formats.seconds(measured), aside))
    elif measured:
        tiles.append(("time per step, median", formats.seconds(measured), "no forecast was made"))
    if not tiles:
        return ""
    items = []
    for index, (name, value, aside) in enumerate(tiles):
        told = f'<dd class="aside">{text(aside)}</dd>' if aside else ""
        first = ' class="first"' if index == 0 else ""
        items.append(f'<div{first}><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>{told}</div>')
    return f'<dl class="numbers">{"".join(items)}</dl>'


def loss(drawings: Mapping[str, Drawing]) -> str:
    found = [drawings[name] for name in ("loss_by_step", "loss_by_time") if name in drawings]
    if not found:
        return ""
    return section(
        "Loss", f'<div class="pair">{"".join(figure(d, heading=True, alone=False) for d in found)}</div>'
    )


def layouts(log: RunLog, comparison: Comparison, drawings: Mapping[str, Drawing]) -> str:
    note = log.plan.reason if log.plan else ""
    if not log.trials:
        return section("Layout", note=f"{log.plan.label}: {note}") if log.plan and note else ""
    rows: list[list[str | Cell]] = [_layout_row(measured) for measured in comparison.measured]
    chosen = next((i for i, m in enumerate(comparison.measured) if m is comparison.chosen), None)
    parts = [figure(drawings["layouts"])] if "layouts" in drawings else []
    if rows:
        head = ("layout", "time per step", "samples/s", "speed-up", "per processor", *PARTS[:3])
        parts.append(table(head, rows, chosen=chosen))
        rounds = sorted({len(m.trial.step_s) for m in comparison.measured})
        told = f"{_rounds(rounds)} Computation, communication and data are medians of one worker's steps."
        parts.append(f'<p class="remark">{text(told)}</p>')
    for trial in comparison.failed:
        why = verbatim(trial.error or "no reason was given")
        parts.append(f'<div class="showcase"><h3>{text(trial.label)} could not be timed</h3>{why}</div>')
    return section("Layouts measured", *parts, note=note)


def proof(log: RunLog) -> str:
    return section("Proof", note=verdict(log.proof)) if log.proof else ""


def time_per_rank(log: RunLog, drawings: Mapping[str, Drawing]) -> str:
    times = rank_times(log)
    if not times:
        return ""
    shares = mean_shares(times)
    note = "Of all workers' time, " + formats.join(
        [f"{formats.percent(shares[part])} is {part}" for part in PARTS if shares[part] >= 0.005]
    )
    note += "." if log.ranks else "; only the first worker is known, as the run did not reach its end."
    rows = [_rank_row(log, time) for time in times]
    head = ("worker", "time per step", *PARTS, "peak memory", "runs on")
    return section(
        "Where a step's time goes",
        figure(drawings["time_per_rank"]),
        _long_table(head, rows, "workers"),
        note=note,
    )


def batch_size(log: RunLog) -> str:
    return section("Batch size", note=noise_sentence(log)) if log.noise else ""


def held_out(log: RunLog, drawings: Mapping[str, Drawing]) -> str:
    if not log.evaluations:
        return ""
    names = list(dict.fromkeys(name for e in log.evaluations for name in e.metrics))
    columns = [
        [formats.count(e.step) for e in log.evaluations],
        [formats.seconds(e.elapsed_s) for e in log.evaluations],
        *(formats.column([e.metrics.get(name, float("nan")) for e in log.evaluations]) for name in names),
    ]
    rows: list[list[str | Cell]] = [[Cell(value) for value in row] for row in zip(*columns, strict=True)]
    drawing = drawings.get("held_out_metrics")
    last = log.evaluations[-1]
    note = f"On the {formats.plural(last.samples, 'sample')} of the test split." if last.samples else ""
    return section(
        "Held-out metrics",
        figure(drawing) if drawing else "",
        _long_table(("after step", "training time", *names), rows, "evaluations"),
        note=note,
    )


def showcase(log: RunLog) -> str:
    if log.showcase is None:
        return ""
    numbers = facts([(name, text(formats.number(value))) for name, value in log.showcase.numbers.items()])
    texts = "".join(
        f'<div class="showcase"><h3>{text(name)}</h3>{verbatim(value)}</div>'
        for name, value in log.showcase.texts.items()
    )
    return section("What the trained model does", numbers if log.showcase.numbers else "", texts)


def about(log: RunLog) -> str:
    run = log.run
    if run is None:
        return ""
    pairs = [("machine", "<br>".join(text(_host(host)) for host in run.cluster.hosts))]
    if log.plan:
        given = {axis: size for axis, size in log.plan.layout.items() if size not in (None, 1)}
        axes = ", ".join(f"{axis}={size}" for axis, size in given.items())
        pairs.append(("layout", text(log.plan.label) + (f" <code>{text(axes)}</code>" if axes else "")))
    pairs.append(("batch", text(formats.plural(run.batch_size, "sample"))))
    if log.parameters is not None:
        pairs.append(("parameters", text(formats.count(log.parameters))))
    pairs.append(("precision", text(": ".join(filter(None, (run.precision, run.precision_reason))))))
    if run.matmul == "onednn":
        pairs.append(("large matrices", text("multiplied by oneDNN, not by the library that torch takes")))
    sizes = [
        f"{formats.count(n)} to {use}"
        for n, use in ((run.train_samples, "train on"), (run.test_samples, "test on"))
        if n is not None
    ]
    if sizes:
        pairs.append(("samples", text(formats.join(sizes))))
    if run.until:
        pairs.append(("target", text(f"{run.until.metric} {formats.number(run.until.value)}")))
    pairs.append(("seed", text(run.seed)))
    options = [f"<code>{text(f'{name}={value}')}</code>" for name, value in run.options.items()]
    pairs.append(("options", ", ".join(options)))
    if log.end and log.end.weights:
        pairs.append(("weights", f"<code>{text(log.end.weights)}</code>"))
    pairs.append(("versions", text(", ".join(f"{name} {version}" for name, version in run.versions.items()))))
    if run.command:
        pairs.append(("command", f"<code>{text(shlex.join(run.command))}</code>"))
    return section("The run", facts([(name, value) for name, value in pairs if value]))


def messages(log: RunLog) -> str:
    items = [(m.level, m.text) for m in log.messages]
    if log.unread:
        some = "; ".join(log.unread[:3])
        told = f"{formats.plural(len(log.unread), 'line')} of {log.path.name} could not be read: {some}"
        items.append(("warning", told))
    html = ""
    for level, told in items:
        warning = level == "warning"
        mark = "<b>Warning.</b> " if warning else ""
        html += f'<li class="{"warning" if warning else "info"}">{mark}{text(told)}</li>'
    return section("Messages", f'<ul class="messages">{html}</ul>') if html else ""


# --- rows and tiles --------------------------------------------------------------------------------


def _progress_tiles(log: RunLog) -> list[tuple[str, str, str]]:
    done = log.end.steps if log.end else log.steps[-1].step if log.steps else 0
    planned = log.run.total_steps if log.run else None
    tiles = []
    if done or log.end:
        aside = f"of {formats.count(planned)} planned" if planned and planned != done else ""
        if not aside and log.run and log.run.epochs:
            aside = formats.plural(log.run.epochs, "epoch")
        tiles.append(("steps", formats.count(done), aside))
    train_s = log.end.train_s if log.end else log.steps[-1].elapsed_s if log.steps else None
    if train_s:
        aside = f"{formats.seconds(log.end.total_s)} with start and evaluation" if log.end else ""
        tiles.append(("training time", formats.seconds(train_s), aside))
    return tiles


def _first_value(log: RunLog, name: str) -> str:
    first = log.evaluations[0] if len(log.evaluations) > 1 else None
    if first is None or name not in first.metrics:
        return ""
    when = "before training" if first.step == 0 else f"after step {formats.count(first.step)}"
    return f"{formats.number(first.metrics[name])} {when}"


def _layout_row(m: Measured) -> list[str | Cell]:
    def part(value_s: float | None) -> Cell:
        if value_s is None:
            return Cell("–")
        return Cell(formats.seconds(value_s), formats.percent(value_s / m.step_s.median))

    def spread(value: Spread | None, form: Callable[[float], str], short: Callable[[float], str]) -> Cell:
        if value is None:
            return Cell("–")
        low, high = short(value.low), short(value.high)
        return Cell(form(value.median), "" if low == high else f"{low} – {high}")

    return [
        m.label,
        spread(m.step_s, formats.seconds, formats.seconds),
        spread(m.samples_per_s, formats.number, formats.number),
        spread(m.speedup, formats.times, "{:.2f}".format),
        Cell("–" if m.efficiency is None else formats.percent(m.efficiency)),
        part(m.trial.compute_s),
        part(m.trial.communication_s),
        part(m.trial.data_s),
    ]


def _rounds(rounds: Sequence[int]) -> str:
    if rounds == [1]:
        return "One round was timed, so there is no spread to show."
    several = str(rounds[0]) if len(rounds) == 1 else f"{rounds[0]} to {rounds[-1]}"
    return f"Medians of {several} rounds, the layouts taking turns; below, the fastest and the slowest round."


def _rank_row(log: RunLog, time: RankTime) -> list[str | Cell]:
    rank = next((r for r in log.ranks if r.rank == time.rank), None)
    where = memory = "–"
    if rank is not None:
        memory = "–" if rank.peak_memory_bytes is None else formats.size(rank.peak_memory_bytes)
        where = ", ".join(
            filter(None, (rank.host, _cores(rank.cores) if rank.device in ("", "cpu") else rank.device))
        )
    return [
        f"rank {time.rank}",
        Cell(formats.seconds(time.step_s)),
        *(Cell(formats.seconds(time.parts_s[part]), formats.percent(time.share(part))) for part in PARTS),
        Cell(memory),
        where or "–",
    ]


def _cores(cores: Sequence[int]) -> str:
    if not cores:
        return ""
    if len(cores) > 2 and list(cores) == list(range(cores[0], cores[0] + len(cores))):
        return f"cores {cores[0]}–{cores[-1]}"
    return f"{'core' if len(cores) == 1 else 'cores'} {', '.join(map(str, cores))}"


def _host(host: Host) -> str:
    told = f"{host.name}: {host.device_name or host.device}, {formats.plural(host.cores, 'core')}"
    if host.memory_bytes:
        told += f", {formats.size(host.memory_bytes)} of memory"
    return told


def _long_table(head: Sequence[str], rows: Sequence[list[str | Cell]], noun: str) -> str:
    """The whole table, or rows evenly taken from it and the whole behind a click."""
    if len(rows) <= _MOST_ROWS:
        return table(head, rows)
    index = sorted({round(i * (len(rows) - 1) / (_MOST_ROWS - 1)) for i in range(_MOST_ROWS)})
    title = f"<summary>All {formats.count(len(rows))} {text(noun)}</summary>"
    return table(head, [rows[i] for i in index]) + f"<details>{title}{table(head, rows)}</details>"
