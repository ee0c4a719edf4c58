"""Jobs and targets for the planner's tests, drawn at random or written down."""

from __future__ import annotations

import random

from paceline.errors import LayoutError
from paceline.plan.corrections import corrected
from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.profile import Block, Costs, Division, LinkedCluster, Profile, Tried
from paceline.plan.tries import layouts_to_try, sizes_divided
from paceline.records import Cluster, Host

GIB = 1 << 30


def block(name: str, scale: float = 1.0, tps: tuple[int, ...] = (2,), *, fixed_s: float = 1e-4) -> Block:
    """A layer of `scale` × 1 ms forward and 2 ms backward a sample."""
    forward_s = Curve.line(fixed_s * scale, 1e-3 * scale)
    backward_s = Curve.line(2 * fixed_s * scale, 2e-3 * scale)
    num_bytes = int(4e7 * scale)
    divisions = tuple(
        Division(
            tp=tp,
            forward_s=forward_s.scaled(1.1 / tp),
            backward_s=backward_s.scaled(1.1 / tp),
            parameter_bytes=num_bytes // tp,
            trained_bytes=num_bytes // tp,
            saved_bytes=3e6 * scale / tp,
            saved_selective_bytes=1e6 * scale / tp,
            saved_full_bytes=2e5 * scale,
            peak_bytes=1e6 / tp,
            forward_exchanges=(("all-reduce", 1e5),) * 2,
            backward_exchanges=(("all-reduce", 1e5),) * 2,
        )
        for tp in tps
    )
    return Block(
        name=name,
        forward_s=forward_s,
        backward_s=backward_s,
        parameter_bytes=num_bytes,
        trained_bytes=num_bytes,
        saved_bytes=3e6 * scale,
        saved_selective_bytes=1e6 * scale,
        saved_full_bytes=2e5 * scale,
        peak_bytes=1e6,
        output_bytes=1e5,
        divisions=divisions,
    )


def profile(
    scales: tuple[float, ...] = (0.5, 1.0, 1.0, 1.0, 1.0, 2.0),
    batch_size: int = 16,
    tps: tuple[int, ...] = (2,),
    *,
    shares_update: bool = True,
) -> Profile:
    kinds = sorted(set(scales))
    costs = Costs(
        threads=1,
        active=1,
        blocks=tuple(block(f"block{scale}", scale, tps) for scale in kinds),
        row=tuple(kinds.index(scale) for scale in scales),
        optimizer_s_per_byte=1e-10,
        add_s_per_byte=5e-11,
        data_s=Curve.line(0.0, 1e-5),
        fixed_s=1e-4,
        meeting_s=1e-5,
    )
    return Profile(
        job="a test",
        batch_size=batch_size,
        device="cpu",
        costs=(costs,),
        state_per_byte=2.0,
        shares_update=shares_update,
        base_bytes=GIB // 4,
    )


MEMORY = Link(name="shared memory", latency_s=1e-5, bytes_per_s=5e9, is_shared=True)
CABLE = Link(name="gloo", latency_s=1e-4, bytes_per_s=1.25e8)


def linked(
    hosts: int = 1,
    per_host: int = 4,
    *,
    within: Link = MEMORY,
    between: Link = CABLE,
    worker_bytes: int = 16 * GIB,
    speeds: tuple[float, ...] = (),
) -> LinkedCluster:
    made = tuple(
        Host(
            name=f"host{number}",
            device="cpu",
            device_name="a test's",
            cores=per_host,
            memory_bytes=per_host * worker_bytes,
            workers=per_host,
        )
        for number in range(hosts)
    )
    return LinkedCluster(
        cluster=Cluster(hosts=made), within=within, between=between if hosts > 1 else None, speeds=speeds
    )


def random_profile(random: random.Random) -> Profile:
    length = random.randint(2, 6)
    scales = tuple(random.choice((0.25, 1.0, 1.0, 3.0)) for _ in range(length))
    found = profile(
        scales, random.choice((4, 6, 8)), random.choice(((), (2,))), shares_update=random.random() < 0.5
    )
    sends = tuple(random.choice((1e4, 1e5, 2e6)) for _ in range(length))
    return sending(found, *sends) if random.random() < 0.5 else found


def random_tried(random: random.Random, found: Profile, cluster: LinkedCluster) -> Profile:
    """The profile with what layouts took that were tried: more than their forecasts, or less, each by a share of its
    own."""
    forecaster = Forecaster(found, cluster)
    sizes = sizes_divided(cluster.cluster)
    divided = [tp for tp in sizes if all(block.divided(tp) for block in found.costs[0].blocks)]
    every = layouts_to_try(found.batch_size, cluster.cluster, 1, divided=divided)
    more = random.choice((1.0, 1.0, 1.3, 0.9))
    tried = []
    for layout in (layout for group in every for layout in group):
        try:
            step_s = forecaster.forecast(layout).step_s
        except LayoutError:
            continue
        tried.append(Tried(layout=layout, step_s=step_s * more * random.uniform(0.8, 1.4)))
    return corrected(found, cluster, tried)


def sending(found: Profile, *crossing_bytes: float) -> Profile:
    """A profile in which this crosses the cuts after its blocks."""
    costs = (one.model_copy(update={"crossing_bytes": crossing_bytes}) for one in found.costs)
    return found.model_copy(update={"costs": tuple(costs)})


def random_linked(random: random.Random) -> LinkedCluster:
    hosts = random.choice((1, 1, 2, 3))
    return linked(
        hosts,
        random.choice((1, 2, 4)) if hosts == 1 else random.choice((1, 2)),
        within=MEMORY if random.random() < 0.5 else CABLE,
        worker_bytes=int(random.uniform(0.6, 4.0) * GIB),
        speeds=tuple(random.choice((0.5, 1.0)) for _ in range(hosts)),
    )
