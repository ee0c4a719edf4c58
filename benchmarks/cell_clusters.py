"""The clusters that forecasts are held against: this machine, and boxes (box.py) of hosts with cables between them."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence

from box import Box, BoxHost
from box_processes import Ended, Start, Tell, carry_out

from paceline.launch.local import free_port
from paceline.measure.machine import usable_cores
from paceline.plan.profile import LinkedCluster
from paceline.records import Cluster


@dataclasses.dataclass(frozen=True)
class BoxCluster:
    """A cluster by name."""

    name: str
    hosts: tuple[BoxHost, ...] = ()
    """None: this machine as it is, with a worker for each of its cores."""
    bandwidth_bits_per_s: float | None = None
    delay_s: float = 0.0
    is_curve: bool = False
    """Of each number of workers a few layouts are measured, in place of all of them."""

    @property
    def has_pauses(self) -> bool:
        """A worker runs at full speed for some milliseconds, and then not at all for some."""
        return any(
            host.cores is not None and not host.waits and host.cores / host.workers < 1 for host in self.hosts
        )

    def describe(self) -> str:
        """`2 hosts x 0.9 cores, 100 Mbit/s, 1 ms`."""
        if not self.hosts:
            return f"this machine, {len(usable_cores())} cores"
        each = [
            f"{host.cores:g} core{'s' * (host.cores != 1)}" for host in self.hosts if host.cores is not None
        ]
        if any(host.waits for host in self.hosts):
            each = ["a device that waits"]
        cores = each[0] if len(set(each)) == 1 else " and ".join(each)
        workers = f" for {self.hosts[0].workers} workers each" if self.hosts[0].workers > 1 else ""
        rate = self.bandwidth_bits_per_s
        cable = (
            [] if rate is None else [f"{rate / 1e9:g} Gbit/s" if rate >= 1e9 else f"{rate / 1e6:g} Mbit/s"]
        )
        delay = [f"{self.delay_s * 1e3:g} ms"] if self.delay_s else []
        return ", ".join([f"{len(self.hosts)} hosts × {cores}{workers}", *cable, *delay])

    def start(self, command: Sequence[str], timeout_s: float, tell: Tell) -> list[Ended]:
        """Run a program on every worker; what became of each, by rank. Nothing of it remains.

        Raises:
            BoxError: this is not root on Linux, or the box cannot be built.
        """
        if not self.hosts:
            return _start_here(command, timeout_s, tell)
        bandwidth = self.bandwidth_bits_per_s
        with Box(self.hosts, bandwidth_bits_per_s=bandwidth, delay_s=self.delay_s) as box:
            return box.start_workers(command, timeout_s=timeout_s, tell=tell)


class _NoLimits:
    """What stands for a host's control group on this machine itself."""

    def num_killed_for_memory(self) -> int:
        return 0

    def kill_all(self) -> None:
        """Workers end when their starter does (cell_worker.py)."""


def _start_here(command: Sequence[str], timeout_s: float, tell: Tell) -> list[Ended]:
    workers = len(usable_cores())
    shared = {
        **os.environ,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port(None)),
        "GLOO_SOCKET_IFNAME": "lo",
        "WORLD_SIZE": str(workers),
        "LOCAL_WORLD_SIZE": str(workers),
    }
    starts = [
        Start(0, command, {**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)}) for rank in range(workers)
    ]
    return carry_out(starts, [_NoLimits()], timeout_s, tell)


_WAITING = BoxHost(1.0, waits=True)
# Hosts of less than a core have half of this machine together: with all of it they wait for each other's turns, which
# hosts with CPUs of their own do not (docs/clusters.md).
CLUSTERS = {
    cluster.name: cluster
    for cluster in (
        BoxCluster("here"),
        BoxCluster("two-1g", (BoxHost(1.0),) * 2, 1e9),
        BoxCluster("two-100m", (BoxHost(1.0),) * 2, 100e6, 1e-3),
        BoxCluster("four-1g", (BoxHost(0.24),) * 4, 1e9),
        BoxCluster("two-by-two", (BoxHost(1.0, workers=2),) * 2, 300e6),
        BoxCluster("unequal", (BoxHost(1.0), BoxHost(0.5)), 1e9),
        BoxCluster("small-1g", (BoxHost(0.12),) * 2, 1e9),
        BoxCluster("small-100m", (BoxHost(0.12),) * 2, 100e6),
        BoxCluster("eight-1g", (BoxHost(0.12),) * 8, 1e9, is_curve=True),
        BoxCluster("eight-100m", (BoxHost(0.12),) * 8, 100e6, is_curve=True),
        # For jobs that hardly compute (waiting_jobs.py).
        *(
            BoxCluster(f"{word}-waiting-{rate}", (_WAITING,) * number, bits_per_s, is_curve=number == 8)
            for word, number in (("two", 2), ("eight", 8))
            for rate, bits_per_s in (("1g", 1e9), ("100m", 100e6))
        ),
    )
}


def enlarged(linked: LinkedCluster, hosts: int) -> LinkedCluster:
    """A measured cluster of equal hosts with another number of them: cables and workers cost what was measured."""
    first = linked.cluster.hosts[0]
    named = tuple(first.model_copy(update={"name": f"host{number}"}) for number in range(hosts))
    return linked.model_copy(update={"cluster": Cluster(hosts=named), "speeds": ()})
