"""What was measured here, scaled to a described cluster.

A block's time is taken apart into what its products of matrices take at the speed of a large product on this machine,
and the rest, which is mostly reading and writing memory. On a GPU the first part is scaled by the ratio of
floating-point operations a second, the second by that of memory bandwidths, both at a share of the datasheet's peak;
and a pass takes no less than it takes to launch its operations one by one. With an explicit speed everything is scaled
by that.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, TypeVar

from paceline.errors import ClusterError
from paceline.plan.curves import Curve
from paceline.plan.described import DescribedCluster, DescribedHost
from paceline.plan.links import Link
from paceline.plan.profile import Block, Costs, Division, LinkedCluster, Profile
from paceline.records import Cluster, Host

LAUNCH_S = 5e-6
"""Of one operation on a GPU, as eager PyTorch tells them: an assumption."""
GPU_BASE_BYTES = 1 << 30
"""What a GPU's runtime and its libraries take of its memory before there is a model: an assumption."""
GPU_ERROR = 0.2
"""Relative, of forecasts for GPUs that were not measured, in place of past ones: an assumption, until they are held
against some."""
_BYTES_ADDED = 3.0
"""An addition in place reads two bytes and writes one for each byte of the result."""
_BACKWARD = 2.0
"""Products, and operations, of a backward pass for each of the forward pass: gradients of inputs and of weights."""

_Part = TypeVar("_Part", Block, Division)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a plan for a described cluster is made of."""

    profile: Profile
    """Of the first host's devices."""
    linked: LinkedCluster
    """With the other hosts' speeds relative to them."""
    notes: tuple[str, ...]
    """What the numbers rest on, in sentences for the user."""


def estimate(profile: Profile, measured: LinkedCluster | None, described: DescribedCluster) -> Estimate:
    """What `profile`, measured on this machine, would be on the described cluster.

    Args:
        measured: this machine, with the link between its workers; None: not known.

    Raises:
        ClusterError: something that the description leaves to this machine was not measured here.
    """
    first, base = described.hosts[0], _alone(profile)
    scales = [_scale(host, base) for host in described.hosts]
    samples = profile.batch_size / sum(host.workers for host in described.hosts)
    seconds = {scale: _whole_s(_scaled_costs(base, scale), samples) for scale in dict.fromkeys(scales)}
    costs = profile.costs if first.device is None else (base.model_copy(update={"threads": 1, "active": 1}),)
    scaled = profile.model_copy(
        update={
            "device": _kind(first),
            "costs": tuple(_scaled_costs(one, scales[0]) for one in costs),
            "base_bytes": profile.base_bytes if first.device is None else GPU_BASE_BYTES,
            "mapped_bytes": profile.mapped_bytes if first.device is None else 0,
            "splitting_bytes": profile.splitting_bytes if first.device is None else 0,
            **_corrections(profile, first, scales[0]),
        }
    )
    speeds = tuple(seconds[scales[0]] / seconds[scale] for scale in scales)
    linked = _linked(described, measured, speeds)
    return Estimate(scaled, linked, tuple(_notes(profile, base, described, scales)))


@dataclasses.dataclass(frozen=True)
class Scale:
    """By what to multiply what was measured here."""

    products: float
    """Seconds of products of matrices."""
    memory: float
    """Seconds of everything else."""
    product_flops_per_s: float = 0.0
    """Of this machine; 0: the two factors are one."""
    launch_s: float = 0.0
    """Of each operation, at least."""
    host: float = 1.0
    """Seconds of what the host does beside: reading data, and what every step costs."""


def _corrections(profile: Profile, first: DescribedHost, scale: Scale) -> dict[str, Any]:
    """What trials here have shown beyond the sum of the parts.

    It comes from cores that share caches and memory, and from the code around a pipeline's actions: other cores are
    like them, GPUs are not.
    """
    if first.device is not None:
        error = max(profile.past_error, GPU_ERROR)
        nothing = {
            "corrections": (),
            "evaluation_bytes": 0.0,
            "unexplained_bytes": {},
            "unexplained_evaluation_bytes": {},
        }
        return {"tried": (), **nothing, "past_error": error}
    corrections = []
    for one in profile.corrections:
        names = ("step_s", "split_step_s", "micro_s", "action_s", "few_action_s", "weight_action_s")
        found = {name: value for name in names if (value := getattr(one, name)) is not None}
        scaled = {name: value * scale.host for name, value in found.items()}
        # Other clusters have other delays: what was found is taken as it is.
        corrections.append(one.model_copy(update={"workers": None, **scaled}))
    return {"tried": (), "corrections": tuple(corrections)}


def _alone(profile: Profile) -> Costs:
    """What a worker costs that has the machine for itself, with as many threads as make it fastest."""
    fewest = min(costs.active for costs in profile.costs)
    alone = [costs for costs in profile.costs if costs.active == fewest]
    return min(alone, key=lambda costs: _whole_s(costs, profile.batch_size))


def _scale(host: DescribedHost, base: Costs) -> Scale:
    """Of a worker on a host, against one on this machine."""
    device = host.device
    if device is None:
        factor = 1.0 / (host.speed or 1.0)
        return Scale(products=factor, memory=factor, host=factor)
    if host.speed is not None:
        return Scale(products=1.0 / host.speed, memory=1.0 / host.speed)
    if not base.product_flops_per_s:
        raise ClusterError(
            f"how fast {device.name} (host {host.name!r}) is for this job cannot be told",
            cause="an older version has kept the profile, without the speed of a product of matrices",
            next_step="measure the job again without --profile, or give the host a speed in the cluster's file",
        )
    products = base.product_flops_per_s / (device.flops_per_s[host.precision] * host.efficiency)
    memory = products
    if device.memory_bytes_per_s and base.add_s_per_byte:
        memory = _BYTES_ADDED / base.add_s_per_byte / (device.memory_bytes_per_s * host.efficiency)
    return Scale(products, memory, base.product_flops_per_s, LAUNCH_S)


def _scaled_costs(costs: Costs, scale: Scale) -> Costs:
    # The conditions differ in what a product takes, and so in what is left for the rest.
    flops_per_s = costs.product_flops_per_s or scale.product_flops_per_s
    scale = dataclasses.replace(scale, product_flops_per_s=flops_per_s)
    return costs.model_copy(
        update={
            "blocks": tuple(_scaled_block(block, scale) for block in costs.blocks),
            "optimizer_s_per_byte": costs.optimizer_s_per_byte * scale.memory,
            "add_s_per_byte": costs.add_s_per_byte * scale.memory,
            "data_s": costs.data_s.scaled(scale.host),
            "fixed_s": costs.fixed_s * scale.host,
            "meeting_s": costs.meeting_s * scale.host,
        }
    )


def _scaled_block(block: Block, scale: Scale) -> Block:
    divisions = tuple(
        _with_curves(division, block.flops / division.tp, block.operations, scale)
        for division in block.divisions
    )
    whole = _with_curves(block, block.flops, block.operations, scale)
    return whole.model_copy(update={"divisions": divisions})


def _with_curves(part: _Part, flops: float, operations: int, scale: Scale) -> _Part:
    """Each of a part's curves of seconds, scaled."""
    update: dict[str, Any] = {}
    for name in type(part).model_fields:
        curve = getattr(part, name)
        if isinstance(curve, Curve):
            times = _BACKWARD if name.startswith("backward") else 1.0
            update[name] = _scaled_curve(curve, flops * times, operations * times, scale)
    return part.model_copy(update=update)


def _scaled_curve(curve: Curve, flops: float, operations: float, scale: Scale) -> Curve:
    if scale.products == scale.memory and not scale.launch_s:
        return curve.scaled(scale.products)
    found: dict[float, float] = {}
    for samples, seconds in curve.points:
        products_s = min(seconds, flops * samples / scale.product_flops_per_s)
        found[samples] = products_s * scale.products + (seconds - products_s) * scale.memory
    return Curve.of(found).at_least(operations * scale.launch_s)


def _whole_s(costs: Costs, samples: float) -> float:
    """Of the whole model, forward and backward."""
    return sum(block.forward_s(samples) + block.backward_s(samples) for block in costs.model)


def _linked(
    described: DescribedCluster, measured: LinkedCluster | None, speeds: tuple[float, ...]
) -> LinkedCluster:
    hosts = tuple(
        Host(
            name=host.name,
            device=_kind(host),
            device_name=host.device.name if host.device else "cores like this machine's",
            cores=host.cores,
            memory_bytes=host.memory_bytes,
            workers=host.workers,
        )
        for host in described.hosts
    )
    within = tuple(_within(host, measured) for host in described.hosts)
    between = [host.between for host in described.hosts if host.between is not None]
    several = len(hosts) > 1
    return LinkedCluster(
        cluster=Cluster(hosts=hosts),
        within=within[0],
        between=between[0] if several else None,
        speeds=speeds if len(set(speeds)) > 1 else (),
        within_of=within if len(set(within)) > 1 else (),
        between_of=tuple(between) if several and len(set(between)) > 1 else (),
    )


def _within(host: DescribedHost, measured: LinkedCluster | None) -> Link:
    if host.within is not None:
        return host.within
    if host.workers == 1:
        return Link(name="none", latency_s=0.0, bytes_per_s=1e12)
    if measured is None or measured.cluster.hosts[0].workers == 1:
        raise ClusterError(
            f"host {host.name!r} has {host.workers} workers and no link within, and none was measured here",
            cause="only one worker has measured, or its cluster.json is not beside profile.json",
            next_step='add within = "shared-memory" to the cluster\'s file',
        )
    return measured.within


def _kind(host: DescribedHost) -> str:
    return "cpu" if host.device is None else "cuda"


def _notes(profile: Profile, base: Costs, described: DescribedCluster, scales: list[Scale]) -> list[str]:
    hosts = described.hosts
    total = sum(host.workers for host in hosts)
    noun = "host" if len(hosts) == 1 else "hosts"
    notes = [
        f"Estimated, not measured: {described.name} ({len(hosts)} {noun}, {total} workers). "
        "What the job takes here was scaled to it."
    ]
    pairs = itertools.groupby(zip(hosts, scales, strict=True), key=lambda pair: (_kinds_of(pair[0]), pair[1]))
    for (_, scale), group in pairs:
        names = [host.name for host, _ in group]
        host = next(h for h in hosts if h.name == names[0])
        where = names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"
        notes.append(f"{where}: {_factors(host, base, scale)}.")
    notes += [f"{source}." for source in described.sources]
    if any(host.within is None and host.workers > 1 for host in hosts):
        notes.append("Workers of a host exchange what they have to as fast as was measured here.")
    if hosts[0].device is not None:
        notes.append("Reading data, and what a step costs whatever is in it, are taken as here.")
    elif max(c.threads for c in profile.costs) * hosts[0].workers < hosts[0].cores:
        most = max(c.threads for c in profile.costs)
        notes.append(f"Workers have at most {most} threads, as many as were measured.")
    return notes


def _kinds_of(host: DescribedHost) -> tuple[Any, ...]:
    return host.device, host.speed, host.precision, host.efficiency


def _factors(host: DescribedHost, base: Costs, scale: Scale) -> str:
    if host.device is None or host.speed is not None:
        what = host.device.name if host.device else "a worker"
        if host.speed is None:
            return "a worker is taken to be as fast as one here, since the file gives no speed"
        return f"{what} is {host.speed:g} times as fast as a worker here, as the file says"
    peak = host.device.flops_per_s[host.precision]
    memory = "memory bandwidth is not known, and the rest is scaled alike"
    if host.device.memory_bytes_per_s and base.add_s_per_byte:
        memory = (
            f"everything else {1 / scale.memory:,.0f} times, by memory bandwidth "
            f"({_BYTES_ADDED / base.add_s_per_byte / 1e9:.3g} GB/s here)"
        )
    return (
        f"{host.device.name} computes products of matrices {1 / scale.products:,.0f} times as fast as here: "
        f"{host.efficiency:.0%} of its {peak / 1e12:g} TFLOP/s in {host.precision} are assumed, "
        f"and {base.product_flops_per_s / 1e9:.3g} GFLOP/s were measured here; {memory}; "
        f"an operation takes {LAUNCH_S * 1e6:g} µs at least"
    )
