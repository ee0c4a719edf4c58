"""Where the workers of a layout are that exchange something, and what an exchange among them takes."""

from __future__ import annotations

from paceline.plan import links
from paceline.plan.links import Placement
from paceline.plan.profile import LinkedCluster
from paceline.records import AXES, Layout


class Places:
    """Of layouts on one cluster. What several layouts have in common is found once."""

    def __init__(self, linked: LinkedCluster) -> None:
        self.linked = linked
        self._known: dict[tuple[int, int, int], Placement] = {}
        self._host_of = [at for at, host in enumerate(linked.cluster.hosts) for _ in range(host.workers)]

    def host_of(self, rank: int) -> int:
        """The number of the host that a worker is on."""
        return self._host_of[rank]

    def speeds_along(self, layout: Layout) -> tuple[float, ...]:
        """Of each worker of a pipeline: of the slowest of those that have the same stages; without one: of all."""
        if not self.linked.speeds:
            return (1.0,) * layout.pp
        each, speeds = layout.workers // layout.pp, self.linked.speeds_of_workers
        return tuple(min(speeds[at * each : (at + 1) * each]) for at in range(layout.pp))

    def of(self, layout: Layout, axis: str) -> Placement:
        """Where the workers are that differ along one axis only; `data`: along both of data parallelism."""
        axes = ("dp_replicate", "dp_shard") if axis == "data" else (axis,)
        size = 1
        for name in axes:
            size *= getattr(layout, name)
        inner = AXES[AXES.index(axes[-1]) + 1 :]
        stride = 1
        for name in inner:
            stride *= getattr(layout, name)
        key = size, stride, layout.workers
        if key not in self._known:
            self._known[key] = self._find(*key)
        return self._known[key]

    def _find(self, size: int, stride: int, workers: int) -> Placement:
        """Of a group of `size` members whose ranks are `stride` apart, among the first `workers`."""
        per_host = self.linked.per_host
        if workers <= self.linked.cluster.hosts[0].workers:
            return Placement(hosts=1, per_host=size, used=1 if self.linked.has_unequal_links else 0)
        used = self.linked.hosts_of(workers) if self.linked.has_unequal_links else 0
        together = max(1, min(size, per_host // stride))
        while size % together:
            together -= 1
        beside = max(1, min(per_host, workers) // together)
        return Placement(hosts=size // together, per_host=together, beside=beside, used=used)

    def seconds(self, kind: str, place: Placement, num_bytes: float) -> float:
        """Of one exchange of so many bytes."""
        pairs = self.linked.links_of(place.used)
        return max(links.seconds(within, between, kind, place, num_bytes) for within, between in pairs)
