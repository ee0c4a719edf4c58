"""How long it takes workers to exchange something: over one link, or within hosts and between them.

Formulas: Thakur, Rabenseifner and Gropp 2005; Patarasuk and Yuan 2009. With n workers, b bytes, latency α of a message
and β seconds per byte of a link in one direction, all links at once:

    all-reduce of b                  2 (n-1) α + 2 (n-1)/n b β
    all-gather that gives b          (n-1) α +   (n-1)/n b β
    reduce-scatter of b              (n-1) α +   (n-1)/n b β
    all-to-all of b on each          (n-1) α +   (n-1)/n b β
    broadcast of b                   ⌈log2 n⌉ α + b β
    message of b                     α + b β
    stream: the next message after   b β

Where all workers share one medium, such as the memory of a host or the processor that carries its loopback, the bytes
of all of them go through it: n times β. What was measured stands in place of a formula; for another number of workers
it is scaled by the formula's ratio.
"""

from __future__ import annotations

import dataclasses
import functools
import math

from pydantic import Field

from paceline.plan.curves import Curve
from paceline.records import Record

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "broadcast", "message")
STREAM = "stream"
"""Messages one way, one after the other: seconds of each. A `message` is until it is there."""
_SINGLE = ("message", STREAM)


class MeasuredCollective(Record):
    """One kind among a number of workers: seconds against bytes."""

    kind: str
    workers: int = Field(ge=2)
    seconds: Curve


class Link(Record):
    """What carries tensors among some workers."""

    name: str
    latency_s: float = Field(ge=0)
    """α."""
    bytes_per_s: float = Field(gt=0)
    """1/β."""
    is_shared: bool = False
    """All workers' bytes go through one medium."""
    cables: int = Field(default=1, ge=1)
    """Between hosts: how many such links each host has. A worker uses one of them; several share them out."""
    measured: tuple[MeasuredCollective, ...] = ()

    def seconds(self, kind: str, workers: int, num_bytes: float) -> float:
        """Of one operation of `num_bytes` on each worker (of an all-gather: what it gives), all workers at once."""
        if workers == 1 or num_bytes == 0:
            return 0.0
        known = self._known(kind, workers)
        if known is None:
            return self._by_formula(kind, workers, num_bytes)
        found = known.seconds(num_bytes)
        if known.workers == workers or kind in _SINGLE:
            return found
        # What it takes without any bytes grows as the messages do, the rest as the bytes.
        fixed_s = min(known.seconds.points[0][1], found)
        messages, volume = self._shape(kind, workers)
        known_messages, known_volume = self._shape(kind, known.workers)
        return fixed_s * messages / known_messages + (found - fixed_s) * volume / known_volume

    def _by_formula(self, kind: str, workers: int, num_bytes: float) -> float:
        messages, volume = self._shape(kind, workers)
        return messages * self.latency_s + volume * num_bytes / self.bytes_per_s

    def _shape(self, kind: str, workers: int) -> tuple[float, float]:
        messages, volume = _shape(kind, workers)
        return messages, volume * workers if self.is_shared and kind not in _SINGLE else volume

    def _known(self, kind: str, workers: int) -> MeasuredCollective | None:
        same = [found for found in self.measured if found.kind == kind]
        return min(same, key=lambda found: (abs(found.workers - workers), found.workers), default=None)


@functools.cache
def _shape(kind: str, workers: int) -> tuple[float, float]:
    """Messages one after the other, and bytes through each worker's link in one direction, as a share of b."""
    n = workers
    match kind:
        case "all-reduce":
            return 2 * (n - 1), 2 * (n - 1) / n
        case "all-gather" | "reduce-scatter" | "all-to-all":
            return n - 1, (n - 1) / n
        case "broadcast":
            return math.ceil(math.log2(n)), 1.0
        case "message":
            return 1, 1.0
        case "stream":
            return 0, 1.0
    raise ValueError(f"no collective {kind!r}")


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where the members of one group are: `per_host` on each of `hosts` hosts."""

    hosts: int
    per_host: int
    beside: int = 1
    """Groups of the same axis that have members on one host: they use its cable at the same time."""
    used: int = 0
    """Hosts that the layout has workers on, where hosts have unequal links; 0: what one has, all have."""

    @property
    def workers(self) -> int:
        return self.hosts * self.per_host


def seconds(within: Link, between: Link | None, kind: str, place: Placement, num_bytes: float) -> float:
    """Of one operation among the members of a group, as `comm/hierarchy.py` carries it out.

    An all-reduce is a reduce-scatter in each host, an all-reduce of each worker's part with those of its place on the
    other hosts, and an all-gather in each host; an all-gather first between hosts, then within; a reduce-scatter the
    other way round. All that a host sends goes through its one cable.
    """
    if place.workers == 1 or num_bytes == 0:
        return 0.0
    if place.hosts == 1:
        return within.seconds(kind, place.per_host, num_bytes)
    if between is None:
        raise ValueError("workers on several hosts, and no link between hosts")
    k, h = place.per_host, place.hosts
    sharing = k * place.beside
    if k == 1 or kind in (*_SINGLE, "all-to-all"):
        # Messages and all-to-all are not gathered on a host first.
        members = h if k == 1 else place.workers
        return _over_cable(between, kind, members, num_bytes, sharing)
    crossing = _over_cable(between, kind, h, num_bytes / k, sharing)
    match kind:
        case "all-reduce":
            return (
                within.seconds("reduce-scatter", k, num_bytes)
                + crossing
                + within.seconds("all-gather", k, num_bytes)
            )
        case "all-gather" | "reduce-scatter":
            return h * within.seconds(kind, k, num_bytes / h) + crossing
        case _:
            return within.seconds(kind, k, num_bytes) + crossing


def _over_cable(between: Link, kind: str, hosts: int, num_bytes: float, sharing: int) -> float:
    """Between hosts, where `sharing` workers of each use its cables at once.

    One after the other would take as long as all at once: the bytes count so many times, the messages once.
    """
    return between.seconds(kind, hosts, num_bytes * max(1.0, sharing / between.cables))
