"""Which layouts are measured, and those that rules of thumb would take.

The space, "every layout that fits": on 1, 2, 4, … workers all products of dp_replicate, dp_shard (zero=1 and 3; in a
pipeline 1), pp, and tp within a host; with micro 1 and 2, in a pipeline of p stages p, 2p and 4p, under 1F1B and
ZB-H1; one process with one thread and with all of its host's. The batch has to be divided evenly. Over hosts the space
has tp over all workers only; the planner has no forecast of that where hosts have several workers. What the planner
itself would take is measured too, whatever it is.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.search import search
from paceline.plan.ways import ways_of
from paceline.records import Cluster, Layout

SCHEDULES = ("1f1b", "zb-h1")
PURE_DATA, HOST_TENSOR, FSDP, ONE = (
    "pure data parallelism",
    "tensor parallelism in a host, pipeline over hosts",
    "FSDP everywhere",
    "one process",
)
RULES = (PURE_DATA, HOST_TENSOR, FSDP, ONE)
_LOOKED_AT, _FEW = 40, 3
"""For a curve: forecasts of a number of workers, and how many of them are measured."""


def threads_of(cluster: Cluster, workers: int) -> int | None:
    """Of each of several workers: an equal share of the smallest host's cores."""
    if cluster.device != "cpu":
        return None
    return max(1, min(host.cores // min(host.workers, workers) for host in cluster.hosts))


def is_possible(layout: Layout, batch_size: int) -> bool:
    return batch_size % (layout.data_parallel * layout.micro) == 0


def whole_space(cluster: Cluster, batch_size: int) -> list[Layout]:
    """All of them, by number of workers."""
    found = list(_singles(cluster))
    workers = 2
    while workers <= cluster.workers:
        threads = threads_of(cluster, workers)
        found += [x.model_copy(update={"threads": threads}) for x in _several(cluster, workers)]
        workers *= 2
    return [layout for layout in dict.fromkeys(found) if is_possible(layout, batch_size)]


def _singles(cluster: Cluster) -> Iterator[Layout]:
    counts = sorted({1, cluster.hosts[0].cores}) if cluster.device == "cpu" else [None]
    for threads, micro in itertools.product(counts, (1, 2)):
        yield Layout(micro=micro, threads=threads)


def _several(cluster: Cluster, workers: int) -> Iterator[Layout]:
    per_host = min(host.workers for host in cluster.hosts)
    sizes = [n for n in _powers(workers) if workers % n == 0]
    for pp, tp in itertools.product(sizes, sizes):
        if workers % (pp * tp):
            continue
        if tp > per_host:
            if tp == workers == cluster.workers:
                yield Layout(tp=tp)
            continue
        data = workers // (pp * tp)
        for shard in (n for n in _powers(data) if data % n == 0):
            for zero in (None,) if shard == 1 else (1,) if pp > 1 else (1, 3):
                for micro in (1, 2) if pp == 1 else (pp, 2 * pp, 4 * pp):
                    for schedule in SCHEDULES if pp > 1 else SCHEDULES[:1]:
                        yield Layout(
                            pp=pp, dp_replicate=data // shard, dp_shard=shard, zero=zero, tp=tp, micro=micro,
                            schedule=schedule,
                        )  # fmt: skip


def _powers(most: int) -> list[int]:
    return [1 << n for n in range(most.bit_length())]


def rules_of_thumb(cluster: Cluster, batch_size: int) -> dict[str, Layout]:
    """What each rule of `RULES` would take, of those that the batch allows; all of it is in the space."""
    workers, hosts = cluster.workers, len(cluster.hosts)
    per_host = min(host.workers for host in cluster.hosts)
    threads = threads_of(cluster, workers)
    micros = (4 * hosts, 2 * hosts, hosts) if hosts > 1 else (1,)
    filled = [Layout(pp=hosts, tp=per_host, micro=micro, threads=threads) for micro in micros]
    found = {ONE: Layout(threads=cluster.hosts[0].cores if cluster.device == "cpu" else None)}
    if workers > 1:
        found[PURE_DATA] = Layout(dp_replicate=workers, threads=threads)
        found[HOST_TENSOR] = next((x for x in filled if is_possible(x, batch_size)), filled[-1])
        found[FSDP] = Layout(dp_shard=workers, zero=3, threads=threads)
    return {rule: found[rule] for rule in RULES if rule in found and is_possible(found[rule], batch_size)}


def curve_space(forecaster: Forecaster) -> list[Layout]:
    """Of each number of workers the layouts with the fastest forecasts, one of a kind, and plain data parallelism."""
    cluster, batch_size = forecaster.linked.cluster, forecaster.profile.batch_size
    found: list[Layout] = []
    for workers in range(1, cluster.workers + 1):
        threads = threads_of(cluster, workers) if workers > 1 else 1
        plain = Layout(dp_replicate=workers, threads=threads)
        found += [plain] if is_possible(plain, batch_size) else []
        try:
            fastest = search(forecaster, number=_LOOKED_AT, workers=workers).fastest
        except LayoutError:
            continue
        kinds = {(ways_of(x.layout), x.layout.pp, x.layout.tp): x.layout for x in reversed(fastest)}
        order = [x.layout for x in fastest if x.layout in kinds.values()]
        found += order[: _FEW if workers > 1 else 1]
    return list(dict.fromkeys(found))
