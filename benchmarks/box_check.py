"""Whether a box is what was asked for: bandwidth, round trip, share of a core, and memory, measured inside it.

`python benchmarks/box.py --check` measures some boxes; with --bandwidth, --delay, --cores or --memory that one. Started
on a host, with a role as its first argument, this file is what measures there: plain sockets, nothing of torch or gloo.
"""

from __future__ import annotations

import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from box import Box
    from box_options import Options

_PORT = 5001
_ROUND_TRIPS = 60
_STREAM_S = 3.0
_SPIN_S = 4.0
_TIMEOUT_S = 60.0
_PIECE = 1 << 18
_PAGE = b"x" * (1 << 20)
BANDWIDTH_WITHIN = 0.05
CORES_WITHIN = 0.05
MEMORY_WITHIN = 0.05
ROUND_TRIP_WITHIN, ROUND_TRIP_WITHIN_S = 0.20, 0.2e-3
"""Whichever is more."""


@dataclasses.dataclass(frozen=True)
class Reading:
    """One quantity of a box."""

    what: str
    asked: float | None
    measured: float
    unit: str
    is_right: bool

    def row(self, box: str) -> str:
        asked = "–" if self.asked is None else f"{self.asked:.4g} {self.unit}".strip()
        error = f"{self.measured / self.asked - 1:+.1%}" if self.asked else "–"
        measured = f"{self.measured:.4g} {self.unit}".strip()
        verdict = "–" if self.asked is None else "yes" if self.is_right else "NO"
        return f"| {box} | {self.what} | {asked} | {measured} | {error} | {verdict} |"


def check_links(box: Box, stream_s: float = _STREAM_S) -> list[Reading]:
    """Between the first two hosts: each direction by itself, both at once, and the round trip."""
    there = _between(box, 0, 1, stream_s, both=False)
    back = _between(box, 1, 0, stream_s, both=False)
    both = _between(box, 0, 1, stream_s, both=True)
    rates = {
        "bandwidth 0 → 1": there["forward"],
        "bandwidth 1 → 0": back["forward"],
        "bandwidth of the slower way of 0 ⇄ 1": min(both["forward"], both["back"]),
    }
    asked = None if box.bandwidth_bits_per_s is None else box.bandwidth_bits_per_s / 1e6
    found = [
        Reading(
            what, asked, rate / 1e6, "Mbit/s", asked is None or _is_near(rate / 1e6, asked, BANDWIDTH_WITHIN)
        )
        for what, rate in rates.items()
    ]
    trip_s, asked_s = (there["round_trip_s"] + back["round_trip_s"]) / 2, 2 * box.delay_s
    near = max(ROUND_TRIP_WITHIN * asked_s, ROUND_TRIP_WITHIN_S)
    found.append(Reading("round trip", asked_s * 1e3, trip_s * 1e3, "ms", abs(trip_s - asked_s) <= near))
    return found


def check_cores(box: Box, spin_s: float = _SPIN_S) -> list[Reading]:
    """The share of a core of one process on each host that always wants one, all at once."""
    shares = [found["cores"] for found in _measure(box, range(len(box.hosts)), "spin", str(spin_s))]
    readings = []
    for number, (host, share) in enumerate(zip(box.hosts, shares, strict=True)):
        asked = None if host.cores is None else min(1.0, host.cores)
        right = asked is None or _is_near(share, asked, CORES_WITHIN)
        readings.append(Reading(f"cores of a process on host {number}", asked, share, "", right))
    return readings


def check_memory(box: Box) -> list[Reading]:
    """Of each host with a limit: how much a process had when the kernel killed it for wanting more."""
    readings = []
    for number, host in enumerate(box.hosts):
        if host.memory_bytes is None:
            continue
        role = ["grow", str(2 * host.memory_bytes)]
        ended = box.run(
            lambda h, role=role, number=number: _program(*role) if h == number else ["true"],
            timeout_s=_TIMEOUT_S,
        )[number]
        asked, reached = host.memory_bytes / 2**20, int(ended.stdout.split()[-1]) / 2**20
        right = ended.killed_for_memory and _is_near(reached, asked, MEMORY_WITHIN)
        readings.append(Reading(f"memory of host {number} when killed", asked, reached, "MiB", right))
    return readings


def check(options: Options) -> bool:
    """Print the table of the box that was asked for, or of some; whether all is as asked."""
    from box import Box, BoxHost

    print("| box | what | asked for | measured | error | as asked |\n" + "|---" * 6 + "|")
    right = True
    for hosts, bandwidth, delay_s in _boxes(options):
        limits = [BoxHost(cores, memory, workers) for cores, memory, workers in hosts]
        with Box(limits, bandwidth_bits_per_s=bandwidth, delay_s=delay_s) as box:
            readings = check_links(box) if len(hosts) > 1 else []
            readings += check_cores(box) if any(host.cores for host in limits) else []
            readings += check_memory(box)
        rate = "unlimited" if bandwidth is None else f"{bandwidth / 1e6:g} Mbit/s"
        for reading in readings:
            print(reading.row(f"{len(hosts)} hosts, {rate}, {delay_s * 1e3:g} ms"), flush=True)
            right = right and reading.is_right
    return right


_Limits = tuple[float | None, int | None, int]


def _boxes(options: Options) -> Iterator[tuple[Sequence[_Limits], float | None, float]]:
    """Hosts, bandwidth and delay: the box that was asked for, or those that come to mind."""
    if options.asks_for_a_box:
        yield options.hosts, options.bandwidth_bits_per_s, options.delay_s
        return
    free: _Limits = (None, None, 1)
    for bandwidth, delay_s in (
        (10e6, 0.0),
        (100e6, 1e-3),
        (1e9, 0.25e-3),
        (100e6, 20e-3),
        (None, 1e-3),
        (None, 0.0),
    ):
        yield [free] * 2, bandwidth, delay_s
    yield [(0.9, 256 << 20, 1), (0.45, 512 << 20, 1)], 100e6, 1e-3
    yield [(0.225, None, 1)] * 8, 1e9, 0.0


def _is_near(measured: float, asked: float, within: float) -> bool:
    return abs(measured / asked - 1) <= within


def _between(box: Box, asking: int, answering: int, stream_s: float, *, both: bool) -> dict[str, float]:
    from box_network import address

    role = ["link", address(answering), str(answering), str(stream_s), "both" if both else "one"]
    first, second = _measure(box, sorted((asking, answering)), *role)
    return first | second


def _measure(box: Box, hosts: Sequence[int], *arguments: str) -> list[dict[str, float]]:
    """Run this file on some hosts, and read what it says there.

    Raises:
        BoxError: one of them failed.
    """
    from box_processes import require_success

    ended = box.run(
        lambda host: _program(*arguments, str(host)) if host in hosts else ["true"], timeout_s=_TIMEOUT_S
    )
    require_success(ended)
    return [json.loads(ended[host].stdout) for host in hosts]


def _program(*arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


# What runs on a host:


def _answer(stream_s: float, both: bool) -> dict[str, float]:
    """Sends back what comes, byte by byte; then takes a stream, and sends one too if `both`."""
    with socket.create_server(("0.0.0.0", _PORT)) as listener:
        listener.settimeout(_TIMEOUT_S)
        peer, _ = listener.accept()
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for _ in range(_ROUND_TRIPS):
            peer.sendall(peer.recv(1))
        if both:
            threading.Thread(target=_send, args=(peer, stream_s)).start()
        return {"forward": _receive(peer)}


def _ask(answering: str, stream_s: float, both: bool) -> dict[str, float]:
    """Counts the seconds until a byte comes back; then sends a stream, and takes one too if `both`."""
    with _connect(answering) as peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        trips_s = []
        for _ in range(_ROUND_TRIPS):
            begin_s = time.perf_counter()
            peer.sendall(b"x")
            peer.recv(1)
            trips_s.append(time.perf_counter() - begin_s)
        sending = threading.Thread(target=_send, args=(peer, stream_s))
        sending.start()
        back = {"back": _receive(peer)} if both else {}
        sending.join()
        return {"round_trip_s": median(trips_s), **back}


def _connect(answering: str) -> socket.socket:
    end_s = time.monotonic() + _TIMEOUT_S
    while True:
        try:
            return socket.create_connection((answering, _PORT), timeout=_TIMEOUT_S)
        except ConnectionRefusedError:
            if time.monotonic() > end_s:
                raise
            time.sleep(0.02)


def _send(peer: socket.socket, stream_s: float) -> None:
    data = bytes(_PIECE)
    end_s = time.monotonic() + stream_s
    while time.monotonic() < end_s:
        peer.sendall(data)
    peer.shutdown(socket.SHUT_WR)


def _receive(peer: socket.socket) -> float:
    """Bits per second of a stream, without its first third, in which TCP finds out how fast it may send."""
    marks = []
    total = 0
    while data := peer.recv(1 << 20):
        total += len(data)
        marks.append((time.monotonic(), total))
    begin_s = marks[0][0] + (marks[-1][0] - marks[0][0]) / 3
    first_s, first = next(mark for mark in marks if mark[0] >= begin_s)
    last_s, last = marks[-1]
    return 8 * (last - first) / (last_s - first_s)


def _spin(seconds: float) -> dict[str, float]:
    time.sleep(0.2)
    begin_s, begun_s = time.monotonic(), time.process_time()
    while time.monotonic() < begin_s + seconds:
        pass
    return {"cores": (time.process_time() - begun_s) / (time.monotonic() - begin_s)}


def _grow(most_bytes: int) -> dict[str, float]:
    """Takes memory and writes to all of it, and says after every mebibyte what it has."""
    held = []
    while len(held) * len(_PAGE) < most_bytes:
        held.append(bytearray(_PAGE))
        # In pages; those of Python's own files count for whoever has read them first.
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        print((resident - shared) * os.sysconf("SC_PAGE_SIZE"), flush=True)
    return {}


def _main(role: str, *arguments: str) -> dict[str, float]:
    match role:
        case "link":
            at, answering, stream_s, ways, host = arguments
            if host == answering:
                return _answer(float(stream_s), ways == "both")
            return _ask(at, float(stream_s), ways == "both")
        case "spin":
            return _spin(float(arguments[0]))
        case "grow":
            return _grow(int(arguments[0]))
    raise ValueError(f"no role {role!r}")


if __name__ == "__main__":
    print(json.dumps(_main(*sys.argv[1:])))
