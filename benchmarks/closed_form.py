"""The usual closed form of a step's time, as a baseline for the planner's forecasts.

Analytical planners (Calculon, Isaev et al. 2023; Galvatron, Miao et al. 2023) add up terms that need no simulation:
computation divided evenly among the stages, the pipeline's bubble as (p - 1) / v of a micro-batch, ring collectives by
their bytes at the bandwidth of the slowest link, and the optimizer by the bytes that it updates. Nothing is known here
of latencies, of uneven stages, of what a small micro-batch loses, of the order of a schedule, or of phases of a
collective within and between hosts.
"""

from __future__ import annotations

from paceline.plan.profile import Block, Division, LinkedCluster, Profile
from paceline.plan.schedules import make_schedule
from paceline.records import Layout

_RING = {"all-reduce": 2.0, "all-gather": 1.0, "reduce-scatter": 1.0, "all-to-all": 1.0, "broadcast": 1.0}
"""Bytes through a worker's link, as a share of (n - 1) / n of the whole."""


def closed_form_s(profile: Profile, linked: LinkedCluster, layout: Layout) -> float:
    """Seconds of a step of `layout`.

    Raises:
        ValueError: what tensor parallelism makes of a block is not known.
    """
    costs = profile.of(layout.threads, min(layout.workers, linked.per_host))
    speed = linked.slowest(layout.workers)
    samples = profile.batch_size / (layout.data_parallel * layout.micro)
    parts = [_part(block, layout.tp) for block in costs.model]
    again = {"none": 0.0, "selective": 0.5, "full": 1.0}[layout.recompute]
    computing_s, exchanging_s = 0.0, 0.0
    for part in parts:
        forward_s, backward_s = _per_sample_s(part.forward_s), _per_sample_s(part.backward_s)
        computing_s += samples * (forward_s * (1 + again) + backward_s) / speed
        if isinstance(part, Division):
            forwards = part.forward_exchanges * (2 if layout.recompute == "full" else 1)
            for kind, num_bytes in (*forwards, *part.backward_exchanges):
                exchanging_s += _ring_s(linked, layout, kind, layout.tp, 1, num_bytes * samples)
    v = make_schedule(layout.schedule, layout.pp, 1, layout.stages).stages_per_worker
    whole_s = (computing_s + exchanging_s) / layout.pp
    piped_s = (layout.micro + (layout.pp - 1) / v) * whole_s
    if layout.pp > 1:
        stride = layout.workers // layout.pp
        output_bytes = max(block.output_bytes for block in costs.model) * samples
        piped_s += 2 * layout.micro * v * output_bytes / _bytes_per_s(linked, layout, 2, stride)
    trained = sum(part.trained_bytes for part in parts) / layout.pp
    whole_bytes = sum(part.parameter_bytes for part in parts) / layout.pp
    n, stride = layout.data_parallel, layout.tp
    updating_s = trained / layout.dp_shard * costs.optimizer_s_per_byte / speed
    if layout.dp_shard > 1:
        gathers = 2 if layout.zero_stage == 3 else 1
        updating_s += gathers * _ring_s(linked, layout, "all-gather", layout.dp_shard, stride, whole_bytes)
        updating_s += _ring_s(linked, layout, "reduce-scatter", n, stride, trained)
    else:
        updating_s += _ring_s(linked, layout, "all-reduce", n, stride, trained)
    return piped_s + updating_s


def _part(block: Block, tp: int) -> Block | Division:
    part = block.divided(tp)
    if part is None:
        raise ValueError(f"{block.name} is not known for tp={tp}")
    return part


def _per_sample_s(curve) -> float:
    """As the largest measured size has it: proportional to the samples."""
    samples, seconds = curve.points[-1]
    return seconds / samples


def _ring_s(
    linked: LinkedCluster, layout: Layout, kind: str, members: int, stride: int, num_bytes: float
) -> float:
    if members == 1:
        return 0.0
    share = _RING[kind] * (members - 1) / members
    return share * num_bytes / _bytes_per_s(linked, layout, members, stride)


def _bytes_per_s(linked: LinkedCluster, layout: Layout, members: int, stride: int) -> float:
    """What one worker has of the slowest link in a group whose ranks are `stride` apart."""
    if members * stride <= linked.per_host or layout.workers <= linked.per_host or linked.between is None:
        return min(within.bytes_per_s for within, _ in linked.links_of(0))
    between = min((b for _, b in linked.links_of(0) if b is not None), key=lambda b: b.bytes_per_s * b.cables)
    return between.bytes_per_s * min(1.0, between.cables / linked.per_host)
