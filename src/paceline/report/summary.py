"""The result of a run as a table at its end."""

from __future__ import annotations

from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from paceline.report import formats
from paceline.report.analysis import (
    PARTS,
    compare,
    last_metrics,
    mean_shares,
    rank_times,
    samples_per_s,
)
from paceline.report.noise import noise_sentence
from paceline.report.proofs import verdict
from paceline.report.reader import RunLog
from paceline.report.sentences import how_replanned, result, step_against_forecast, why_not_more


def print_summary(console: Console, log: RunLog) -> None:
    """Print what the run did, how fast and why not faster, and where its files are; or that it failed.

    The error itself is the command's to print, once.
    """
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column()
    for name, value in _rows(log):
        table.add_row(Text(name), Text(value))
    console.print()
    console.print(Text(f"{log.name}: {log.status}", style="bold red" if log.status == "failed" else "bold"))
    console.print(Padding(table, (0, 0, 0, 2)))
    if log.unread:
        told = f"{formats.plural(len(log.unread), 'line')} of {log.path} could not be read: {log.unread[0]}"
        console.print(Text(f"warning: {told}", style="yellow"), soft_wrap=True)


def _rows(log: RunLog) -> list[tuple[str, str]]:
    rows = [("steps", _steps(log)), ("speed", _speed(log))]
    rows.append(("metrics", formats.metrics(last_metrics(log))))
    if log.plan:
        comparison = compare(log)
        rows.append(
            ("layout", " ".join(filter(None, (result(log, comparison), why_not_more(log, comparison)))))
        )
    shares = mean_shares(rank_times(log))
    told = [f"{part} {formats.percent(shares[part])}" for part in PARTS if shares.get(part, 0.0) >= 0.005]
    rows.append(("time", ", ".join(told)))
    rows.append(("step", step_against_forecast(log)))
    rows.append(("replan", " ".join(how_replanned(event) for event in log.replans)))
    rows.append(("batch", noise_sentence(log)))
    if log.proof:
        rows.append(("proof", verdict(log.proof)))
    if log.end and log.end.weights:
        rows.append(("weights", str(log.directory / log.end.weights)))
    report = log.directory / "report.html"
    rows.append(("report", str(report) if report.exists() else ""))
    return [(name, value) for name, value in rows if value]


def _steps(log: RunLog) -> str:
    if log.end:
        return (
            f"{formats.count(log.end.steps)} in {formats.seconds(log.end.train_s)} of training, "
            f"{formats.seconds(log.end.total_s)} in all"
        )
    if log.steps:
        return f"{formats.count(log.steps[-1].step)} so far in {formats.seconds(log.steps[-1].elapsed_s)}"
    return ""


def _speed(log: RunLog) -> str:
    speed = samples_per_s(log)
    if speed is None:
        return ""
    tokens = log.run.tokens_per_sample if log.run else None
    told = f"{formats.number(speed)} samples/s"
    return f"{told}, {formats.number(speed * tokens)} tokens/s" if tokens else told
