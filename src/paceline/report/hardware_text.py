"""What was measured of machines, in the terminal: devices, exchanges, and both at once."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.plan.fits import Fit, fit
from paceline.plan.hardware import DeviceSpeed, Exchanges, Hardware
from paceline.plan.links import MeasuredCollective
from paceline.records import Host
from paceline.report import formats

NAMES = {"message": "send/receive"}
"""Of kinds of collectives, where a user would not say it as the planner does."""


def print_hardware(console: Console, hardware: Hardware) -> None:
    """All of it, one table after the other."""
    for host, speeds in zip(hardware.cluster.hosts, hardware.devices, strict=True):
        console.print(Text(_host(host), style="bold"))
        console.print(_devices(host, speeds))
        console.print()
    for exchanges in hardware.exchanges:
        console.print(Text(f"{exchanges.workers} workers, {_way(exchanges)}", style="bold"))
        print_collectives(console, exchanges.measured, exchanges.fits)
        console.print()
    overlapped = [exchanges for exchanges in hardware.exchanges if exchanges.overlaps]
    if overlapped:
        console.print(Text("An all-reduce while matrices are multiplied", style="bold"))
        console.print(_overlaps(overlapped))
        console.print(
            Text(
                "Hidden: what of the all-reduce costs nothing; below 0 both together are slower than in turn."
            )
        )


def print_collectives(
    console: Console, measured: Sequence[MeasuredCollective], fits: dict[str, Fit] | None = None
) -> None:
    """Times against bytes, then latency and bandwidth.

    Args:
        fits: by kind; None: they are found here.
    """
    console.print(_collectives(measured))
    console.print()
    console.print(_fits(fits or {one.kind: fit(one.seconds.points) for one in measured}))


def _host(host: Host) -> str:
    return (
        f"{host.name}: {host.device_name}, {formats.plural(host.cores, 'core')}, "
        f"{formats.size(host.memory_bytes)} of memory, {formats.plural(host.workers, 'worker')}"
    )


def _way(exchanges: Exchanges) -> str:
    return (
        exchanges.transport if exchanges.place == "one host" else f"{exchanges.transport} ({exchanges.place})"
    )


def _plain_table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _devices(host: Host, speeds: Sequence[DeviceSpeed]) -> Table:
    table = _plain_table("each of", ("product, GFLOP/s", "addition, GB/s", "copy, GB/s"))
    for speed in speeds:
        told = formats.plural(speed.active, "worker")
        told += f" × {formats.plural(speed.threads, 'thread')}" if host.device == "cpu" else ""
        rates = speed.product_flops_per_s, speed.add_bytes_per_s, speed.copy_bytes_per_s
        table.add_row(told, *(f"{rate / 1e9:.4g}" for rate in rates))
    return table


def _collectives(measured: Sequence[MeasuredCollective]) -> Table:
    # At its hyphen, a name takes two lines.
    names = [NAMES.get(one.kind, one.kind).replace("-", "-\n").replace("/", "/\n") for one in measured]
    table = _plain_table("message", names)
    columns = [one.seconds.points for one in measured]
    for row in itertools.zip_longest(*columns):
        sizes = [point[0] for point in row if point is not None]
        cells = ["–" if point is None else formats.seconds(point[1]) for point in row]
        table.add_row(formats.size(min(sizes)), *cells)
    return table


def _fits(fits: dict[str, Fit]) -> Table:
    table = _plain_table("fitted", ("up to", "latency", "bandwidth", "off by"))
    for kind, found in fits.items():
        for number, piece in enumerate(found.pieces):
            first = number == 0
            rate = "–" if piece.bytes_per_s is None else f"{formats.size(piece.bytes_per_s)}/s"
            table.add_row(
                NAMES.get(kind, kind) if first else "",
                formats.size(piece.most_bytes),
                formats.seconds(piece.latency_s),
                rate,
                formats.percent(found.error) if first else "",
            )
    return table


def _overlaps(groups: Sequence[Exchanges]) -> Table:
    names = ("message", "products\nalone", "all-reduce\nalone", "both\nat once", "\nhidden")
    table = _plain_table("workers", names)
    for exchanges in groups:
        for overlap in exchanges.overlaps:
            table.add_row(
                f"{exchanges.workers}, {_way(exchanges)}",
                formats.size(overlap.num_bytes),
                formats.seconds(overlap.computing_s),
                formats.seconds(overlap.exchanging_s),
                formats.seconds(overlap.both_s),
                _share(overlap.hidden),
            )
    return table


def _share(share: float) -> str:
    return formats.percent(share) if share >= 0 else f"−{formats.percent(-share)}"
