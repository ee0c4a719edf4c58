"""The fastest layouts of a job on a cluster, found without forecasting all of them.

Exact: what is left out cannot be faster than what is found. Each layout has a bound that is found at once
(`Forecaster.floor_s`), and in the order of these a closer one (`Forecaster.least_s`); in the order of those they are
forecast, until the bound itself is slower than what is wanted.
"""

from __future__ import annotations

import bisect
import dataclasses
import heapq
from collections.abc import Iterator

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.profile import Profile
from paceline.plan.room import memory_margin, room_bytes
from paceline.plan.schedules import SCHEDULES
from paceline.plan.terms import Forecast
from paceline.records import RECOMPUTE, Layout

FEW = 16
"""Up to this number of workers every size of every axis is tried; above, those that divide the number of workers."""
_LEVEL_ERRORS, _LEVEL = 2.0, 0.03
"""Standard errors of a measured step, and a share of it, within which two forecasts are level. Of processes, and of
data parallelism, that were tried in two micro-batches and up to 3 % faster so, none was more than 2 % faster when it
was timed for long (docs/log.md, 2026-11-30)."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """A layout that would not fit."""

    layout: Layout
    needed_bytes: int
    room_bytes: int

    @property
    def lacking_bytes(self) -> int:
        return self.needed_bytes - self.room_bytes


@dataclasses.dataclass(frozen=True)
class Found:
    """What a search has found."""

    fastest: tuple[Forecast, ...]
    """Those that fit, the fastest first, or what is plainer than it and level with it (`_plainer`); of layouts that
    differ in `recompute` alone the fastest that fits."""
    num_forecast: int
    num_possible: int
    """Layouts with a bound, recomputation aside."""
    smallest: Refused | None
    """Of those refused for memory on the way, the one that lacks least."""


def search(
    forecaster: Forecaster,
    *,
    number: int = 10,
    workers: int | None = None,
    memory_bytes: int | None = None,
    margin: float | None = None,
) -> Found:
    """The `number` fastest layouts.

    Args:
        workers: exactly so many workers; None: any number up to what the cluster has.
        memory_bytes: what a worker may use; None: its host's memory over the workers that the layout has there.
        margin: share of it that is left free; None: `memory_margin`.

    Raises:
        LayoutError: nothing fits; the layout that lacks least is named. Or there is no layout of so many workers.
    """
    if margin is None:
        margin = memory_margin(forecaster.linked)
    possible = [layout for base in _bases(forecaster, workers) for layout in _sharded(forecaster, base)]
    if not possible:
        number_of = "any number of" if workers is None else workers
        raise LayoutError(
            f"no layout has {number_of} workers: the batch of {forecaster.profile.batch_size} samples and the "
            f"{len(forecaster.profile.costs[0].model)} blocks of the model cannot be divided so",
            next_step="use another number of workers, or another batch size",
        )
    bounded = [(forecaster.floor_s(layout), False, index) for index, layout in enumerate(possible)]
    heapq.heapify(bounded)
    fastest: list[tuple[float, str, Forecast]] = []
    smallest: Refused | None = None
    num_forecast = 0
    while bounded:
        least_s, is_close, index = heapq.heappop(bounded)
        if len(fastest) >= number and least_s > fastest[number - 1][0]:
            break
        if not is_close:
            heapq.heappush(bounded, (forecaster.least_s(possible[index]), True, index))
            continue
        fit: list[tuple[float, str, Forecast]] = []
        for layout in _recomputing(possible[index]):
            num_forecast += 1
            found = forecaster.forecast(layout, apart=False)
            room = room_bytes(forecaster.linked, layout, memory_bytes, margin)
            needed = forecaster.needed_bytes(layout) if memory_bytes is None else found.memory.own
            if needed <= room:
                fit.append((found.step_s, str(layout), found))
                if layout.recompute == RECOMPUTE[0] and forecaster.has_room(layout):
                    break  # computing anything again takes longer
                continue
            refused = Refused(layout, needed, room)
            if smallest is None or refused.lacking_bytes < smallest.lacking_bytes:
                smallest = refused
        if fit:
            bisect.insort(fastest, min(fit, key=lambda f: f[:2]), key=lambda f: f[:2])
    if not fastest:
        assert smallest is not None
        raise LayoutError(
            f"no layout fits: the nearest, {smallest.layout}, needs {smallest.needed_bytes / 2**20:,.0f} MiB a "
            f"worker, and there are {smallest.room_bytes / 2**20:,.0f} MiB ({margin:.0%} left free)",
            next_step="use more workers, workers with more memory, or a smaller model or batch",
        )
    first = fastest[0][2].layout
    chosen = _plainest(forecaster, first, workers, memory_bytes, margin)
    order = dict.fromkeys([chosen, *(found.layout for _, _, found in fastest)])
    told = tuple(map(forecaster.forecast, list(order)[:number]))
    return Found(told, num_forecast, len(possible), smallest)


def _plainest(
    forecaster: Forecaster, fastest: Layout, workers: int | None, memory_bytes: int | None, margin: float
) -> Layout:
    """The fastest layout, or the plainest that fits and is as fast, as far as the measurements can tell.

    The least of many forecasts that rest on noisy trials is least by chance, too, and those that split in more ways
    are more. Where nothing was tried only micro-batches are looked at.
    """
    level = max(_LEVEL, _LEVEL_ERRORS * forecaster.profile.spread)
    level_s = forecaster.forecast(fastest).step_s * (1 + level)
    for group in _plainer(forecaster.profile, fastest, workers):
        found: list[tuple[float, Layout]] = []
        for layout in group:
            try:
                forecast = forecaster.forecast(layout)
            except LayoutError:
                continue
            needed = forecaster.needed_bytes(layout) if memory_bytes is None else forecast.memory.own
            fits = needed <= room_bytes(forecaster.linked, layout, memory_bytes, margin)
            if fits and forecast.step_s <= level_s:
                found.append((forecast.step_s, layout))
        if found:
            return min(found, key=lambda item: item[0])[1]
    return fastest


def _plainer(profile: Profile, layout: Layout, workers: int | None) -> Iterator[list[Layout]]:
    """What does the same with less: layouts that are as plain as each other, the plainest first.

    Whatever splits the model or shards its state, one process, and plain data parallelism over as many workers; the
    same with less of the state sharded; without a pipeline, the same in fewer micro-batches. And what was tried in
    place of what was not.
    """
    in_parts = range(1, layout.micro if layout.pp == 1 else 1)
    tried = [one.layout for one in profile.tried if workers in (None, one.layout.workers)]
    if profile.tried:
        if layout.splits_model:
            alone = [Layout(threads=costs.threads) for costs in profile.costs] if workers is None else []
            yield [*alone, Layout(dp_replicate=layout.workers, threads=layout.threads)]
        for zero in range(layout.zero_stage if layout.dp_shard > 1 else 0):
            update: dict[str, int | None] = {"zero": zero}
            if not zero:
                update = {"zero": None, "dp_shard": 1, "dp_replicate": layout.data_parallel}
            for micro in (*in_parts, layout.micro):
                yield [layout.model_copy(update={**update, "micro": micro})]
    for micro in in_parts:
        yield [layout.model_copy(update={"micro": micro})]
    if layout not in tried:
        yield tried


def layouts(forecaster: Forecaster, workers: int | None = None) -> Iterator[Layout]:
    """Every layout that `search` chooses among, memory aside."""
    for base in _bases(forecaster, workers):
        for layout in _sharded(forecaster, base):
            yield from _recomputing(layout)


def _recomputing(layout: Layout) -> Iterator[Layout]:
    """Itself, and the same with something computed again, which is never faster."""
    for recompute in RECOMPUTE[: 1 if layout.schedule.startswith("zb") else None]:
        yield layout.model_copy(update={"recompute": recompute})


def _bases(forecaster: Forecaster, workers: int | None) -> Iterator[Layout]:
    """Layouts with plain data parallelism and without recomputation: each stands for all that differ in these."""
    profile, linked = forecaster.profile, forecaster.linked
    most = workers or linked.cluster.workers
    batch = profile.batch_size
    threads = sorted({costs.threads for costs in profile.costs})
    num_blocks = profile.costs[0].most_stages
    splits = {1, *(d.tp for block in profile.costs[0].blocks for d in block.divisions)}
    sizes = [n for n in range(1, most + 1) if most <= FEW or most % n == 0]
    # Over several hosts where they have one worker each: what more of them make of a block was not measured.
    for tp in sorted(t for t in splits if t <= linked.per_host or linked.per_host == 1):
        for pp in (p for p in sizes if p * tp <= most and p <= num_blocks):
            for dp in _divisors(batch, most // (pp * tp)):
                used = pp * tp * dp
                if workers is not None and used != workers:
                    continue
                for count in threads:
                    for micro in _divisors(batch // dp, batch // dp):
                        for schedule in SCHEDULES if pp > 1 else ("1f1b",):
                            layout = Layout(
                                pp=pp, dp_replicate=dp, tp=tp, micro=micro, schedule=schedule, threads=count
                            )
                            if _is_possible(forecaster, layout):
                                yield layout


def _is_possible(forecaster: Forecaster, layout: Layout) -> bool:
    cluster = forecaster.linked.cluster
    threads = layout.threads or 1
    if cluster.device == "cpu":
        here = min(layout.workers, forecaster.linked.per_host)
        if threads > 1 and threads * here > min(host.cores for host in cluster.hosts):
            return False
    try:
        forecaster.check(layout)
    except LayoutError:
        return False
    return True


def _sharded(forecaster: Forecaster, base: Layout) -> Iterator[Layout]:
    """Itself, and the same with its state sharded: over all of its data-parallel workers, or within each host."""
    yield base
    n = base.dp_replicate
    if n == 1:
        return
    for shard in sorted({n, forecaster.place(base, "data").per_host} - {1}):
        for zero in (1, 2, 3) if base.pp == 1 else (1, 2):
            yield base.model_copy(update={"dp_replicate": n // shard, "dp_shard": shard, "zero": zero})


def _divisors(number: int, most: int) -> list[int]:
    return [d for d in range(1, min(number, most) + 1) if number % d == 0]
