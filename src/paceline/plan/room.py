"""What a plan lets the workers of a layout take of their hosts' memory."""

from __future__ import annotations

from paceline.plan.profile import LinkedCluster
from paceline.records import Layout

_MARGIN, _MARGIN_OF_GPUS = 0.2, 0.1
"""Share of a worker's memory that a plan leaves free: forecasts err, and allocators do not fill what they take. A
program holds more or less by a tenth from run to run on CPUs, where malloc fits its tensors in, and by less than a
hundredth on GPUs (docs/memory_forecasts.md, docs/gpus.md)."""


def memory_margin(linked: LinkedCluster) -> float:
    """Share of the memory of its workers that a plan leaves free."""
    return _MARGIN if linked.cluster.device == "cpu" else _MARGIN_OF_GPUS


def room_bytes(
    linked: LinkedCluster, layout: Layout, memory_bytes: int | None = None, margin: float | None = None
) -> int:
    """What a plan lets each worker of a layout take.

    Args:
        memory_bytes: what a worker has; None: its host's memory over the workers that the layout has there.
        margin: share of it that is left free; None: `memory_margin`.
    """
    most = linked.worker_bytes(layout.workers) if memory_bytes is None else memory_bytes
    return int(most * (1 - (memory_margin(linked) if margin is None else margin)))
