"""Which layouts are timed for a moment while a job is measured: what splitting costs beyond the sum of its parts."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from paceline.records import Cluster, Layout

_SEVERAL = 2
"""Micro-batches of the second layout of a way, which tells what each micro-batch pays."""
_MOST_TIMES = 4
"""So many times as many micro-batches as stages the pipeline with most has."""
_MANY = 4
"""Workers, of which two are looked at by themselves."""
_FAR = 4
"""So many times as many workers as the few, or more, are so far from them that some between are tried."""


def sizes_divided(cluster: Cluster) -> list[int]:
    """Among how many workers blocks are divided to measure that: all of the first host, half of them, and so on down to
    two; of hosts with one worker each two, or all where there are no more than three. Of one worker none."""
    here, everyone = cluster.hosts[0].workers, cluster.workers
    sizes = [_few(here, everyone)]
    while sizes[-1] > 2 and sizes[-1] % 2 == 0:
        sizes.append(sizes[-1] // 2)
    return [n for n in sizes if n > 1]


def _few(here: int, everyone: int) -> int:
    """Workers that are looked at by themselves, where there are more."""
    return here if here > 1 else 2 if everyone >= _MANY else everyone


def layouts_to_try(
    batch_size: int, cluster: Cluster, threads: int, *, divided: Sequence[int]
) -> list[tuple[Layout, ...]]:
    """Some of each way of splitting, and of ways combined, over the first host's workers and over all.

    Where hosts have one worker each, over two of four and more as well: what a way costs among all is not what it costs
    among few. Where all are many times the few, plain data parallelism is also tried over a number of workers between
    them: a speed-up curve bends there.

    Args:
        threads: of each worker, on CPUs.
        divided: of `sizes_divided` those that tensor parallelism is possible with.

    Returns:
        Groups in the order in which they are to be timed, each of layouts that one replica of the model serves, the one
        that holds most first.
    """
    here, everyone = cluster.hosts[0].workers, cluster.workers
    few = _few(here, everyone)
    sizes = [n for n in dict.fromkeys((few, everyone)) if n > 1]
    groups: list[Iterable[Layout]] = _alone(cluster) if sizes else []
    for n in sizes:
        groups += _in_one_way(n, batch_size)
        if n == few:
            groups += [_with_several(Layout(tp=tp, dp_replicate=few // tp)) for tp in divided]
    if (some := _between(few, everyone)) is not None:
        groups.append(_with_several(Layout(dp_replicate=some)))
    if sizes:
        groups += _in_two_ways(here, everyone, divided)
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
    return [_with_several(Layout(threads=count)) for count in counts]


def _with_several(layout: Layout) -> tuple[Layout, Layout]:
    """Itself, and the same with several micro-batches."""
    return layout, layout.model_copy(update={"micro": _SEVERAL})


def _in_one_way(n: int, batch_size: int) -> list[tuple[Layout, ...]]:
    """Over `n` workers, with one and with several micro-batches; pipelines, also with gradients of weights as actions
    of their own, with numbers of them that the batch allows."""
    ways = (Layout(dp_replicate=n), Layout(dp_shard=n, zero=1), Layout(dp_shard=n, zero=3))
    numbers = [m for m in range(n, _MOST_TIMES * n + 1) if batch_size % m == 0]
    pipelines = [Layout(pp=n, micro=m) for m in dict.fromkeys((*numbers[:1], *numbers[-1:]))]
    # What each action of a pipeline takes, and what each step, is told apart by two numbers of micro-batches.
    return [
        *map(_with_several, ways),
        *((pipeline,) for pipeline in pipelines),
        *((_apart(pipeline),) for pipeline in pipelines),
    ]


def _apart(pipeline: Layout) -> Layout:
    """With gradients of weights as actions of their own."""
    return pipeline.model_copy(update={"schedule": "zb-h1"})


def _in_two_ways(here: int, everyone: int, divided: Sequence[int]) -> list[tuple[Layout, ...]]:
    """Over all workers: the first way over the hosts, or over two parts of the only host, the second within them.

    Args:
        divided: among how many workers blocks can be.
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
    if inner == here and inner in divided:
        found += [
            *(x.model_copy(update={"tp": inner}) for x in pipelines),
            Layout(dp_replicate=outer, tp=inner),
            *(Layout(dp_shard=outer, tp=inner, zero=zero) for zero in (1, 3)),
        ]
    elif here == 1:
        found += [Layout(dp_replicate=everyone // tp, tp=tp) for tp in divided if everyone % tp == 0]
    # Without a pipeline one replica serves several micro-batches, too.
    return [(x,) if x.pp > 1 else _with_several(x) for x in found]
