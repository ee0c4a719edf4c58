"""Which layouts are timed for a moment while a job is measured: what splitting costs beyond the sum of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable

from paceline.records import Cluster, Layout

_SEVERAL = 2
"""Micro-batches of the second layout of a way, which tells what each micro-batch pays."""
_MOST_TIMES = 4
"""So many times as many micro-batches as stages the pipeline with most has."""
_MANY = 4
"""Workers, of which two are looked at by themselves."""
_FAR = 4
"""So many times as many workers as the few, or more, are so far from them that some between are tried."""


def num_divided(cluster: Cluster) -> int:
    """Among how many workers blocks are divided to measure that: those of the first host; of hosts with one worker
    each two, or all where there are no more than three."""
    here, everyone = cluster.hosts[0].workers, cluster.workers
    return here if here > 1 else 2 if everyone >= _MANY else everyone


def layouts_to_try(
    batch_size: int, cluster: Cluster, threads: int, *, can_divide: bool
) -> list[tuple[Layout, ...]]:
    """Some of each way of splitting, and of ways combined, over the first host's workers and over all.

    Where hosts have one worker each, over two of four and more as well: what a way costs among all is not what it costs
    among few. Where all are many times the few, plain data parallelism is also tried over a number of workers between
    them: a speed-up curve bends there.

    Args:
        threads: of each worker, on CPUs.
        can_divide: tensor parallelism is possible, over `num_divided` workers.

    Returns:
        Groups in the order in which they are to be timed, each of layouts that one replica of the model serves, the one
        that holds most first.
    """
    here, everyone = cluster.hosts[0].workers, cluster.workers
    few = num_divided(cluster)
    sizes = [n for n in dict.fromkeys((few, everyone)) if n > 1]
    groups: list[Iterable[Layout]] = _alone(cluster) if sizes else []
    for n in sizes:
        groups += _in_one_way(n, batch_size)
        if n == few and can_divide:
            groups.append((Layout(tp=n), Layout(tp=n, micro=_SEVERAL)))
    if (some := _between(few, everyone)) is not None:
        groups.append((Layout(dp_replicate=some), Layout(dp_replicate=some, micro=_SEVERAL)))
    if sizes:
        groups += _in_two_ways(here, everyone, few if can_divide else 1)
    found = []
    for group in groups:
        if cluster.device == "cpu":
            group = (x if x.threads else x.model_copy(update={"threads": threads}) for x in group)
        fit = tuple(x for x in group if batch_size % (x.data_parallel * x.micro) == 0)
        if fit:
            found.append(fit)
    return found


def _between(few: int, everyone: int) -> int | None:
    """So many times the few, by doubling, as all are times that, or the next smaller; None where there is none."""
    doublings = int(math.log2(everyone / few)) // 2
    return few << doublings if everyone >= _FAR * few else None


def _alone(cluster: Cluster) -> list[Iterable[Layout]]:
    """One process, with one thread and with all of its host."""
    counts = sorted({1, cluster.hosts[0].cores}) if cluster.device == "cpu" else [None]
    return [(Layout(threads=count), Layout(threads=count, micro=_SEVERAL)) for count in counts]


def _in_one_way(n: int, batch_size: int) -> list[tuple[Layout, ...]]:
    """Over `n` workers, with one and with several micro-batches; pipelines, also with gradients of weights as actions
    of their own, with numbers of them that the batch allows."""
    ways = (Layout(dp_replicate=n), Layout(dp_shard=n, zero=1), Layout(dp_shard=n, zero=3))
    numbers = [m for m in range(n, _MOST_TIMES * n + 1) if batch_size % m == 0]
    pipelines = [Layout(pp=n, micro=m) for m in dict.fromkeys((*numbers[:1], *numbers[-1:]))]
    # What each action of a pipeline takes, and what each step, is told apart by two numbers of micro-batches.
    return [
        *((way, way.model_copy(update={"micro": _SEVERAL})) for way in ways),
        *((pipeline,) for pipeline in pipelines),
        *((_apart(pipeline),) for pipeline in pipelines),
    ]


def _apart(pipeline: Layout) -> Layout:
    """With gradients of weights as actions of their own."""
    return pipeline.model_copy(update={"schedule": "zb-h1"})


def _in_two_ways(here: int, everyone: int, divided: int) -> list[tuple[Layout, ...]]:
    """Over all workers: the first way over the hosts, or over two parts of the only host, the second within them.

    Args:
        divided: among how many workers blocks can be; 1: among none.
    """
    inner = here if 1 < here < everyone else everyone // 2
    outer = everyone // inner
    if everyone < 4 or outer * inner != everyone:
        return []
    pipeline = Layout(pp=outer, micro=outer)
    # What each further micro-batch takes where pipelines share a cable.
    long = Layout(pp=outer, micro=_MOST_TIMES * outer)
    pipelines = pipeline, long, _apart(pipeline), _apart(long)
    found = [
        *(x.model_copy(update={"dp_replicate": inner}) for x in pipelines),
        *(x.model_copy(update={"dp_shard": inner, "zero": 1}) for x in (pipeline, long)),
        *(Layout(dp_replicate=outer, dp_shard=inner, zero=zero) for zero in (1, 3)),
    ]
    if divided > 1 and inner == here:
        found += [
            *(x.model_copy(update={"tp": inner}) for x in pipelines),
            Layout(dp_replicate=outer, tp=inner),
            *(Layout(dp_shard=outer, tp=inner, zero=zero) for zero in (1, 3)),
        ]
    elif divided > 1 and here == 1 and everyone % divided == 0:
        found.append(Layout(dp_replicate=everyone // divided, tp=divided))
    # Without a pipeline one replica serves several micro-batches, too.
    return [(x,) if x.pp > 1 else (x, x.model_copy(update={"micro": _SEVERAL})) for x in found]
