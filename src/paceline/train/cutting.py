"""By what a pipeline is cut into stages: the planner's word, or what a worker has room for, and how fast they are."""

from __future__ import annotations

import collections
import socket
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.comm.mesh import Mesh
from paceline.measure.machine import available_memory_bytes
from paceline.split.stages import CutBy
from paceline.train.room import TRAINING_BYTES

_ROOM_SHARE = 0.25
"""Of a worker's memory: parameters that take no more of it, with all that training adds to them, need not be shared out
evenly over a pipeline's stages."""
_PRODUCT = 256
"""Rows of the square matrices whose product tells a worker's speed where the planner has not measured it."""
_PRODUCTS_S = 0.5
_SAME = 0.05
"""Hosts that differ by less are taken to be equally fast: so much is noise."""


def cut_by(mesh: Mesh, timed: Callable[[], Any] | None) -> CutBy:
    """For the pipeline of a mesh. A collective call of all its workers.

    Args:
        timed: a forward of a batch as large as a micro-batch.
    """
    if mesh.everyone.gather_json(len(mesh.cuts), "whether the planner has cut the model")[0]:
        return CutBy(timed, cuts=mesh.cuts)
    return CutBy(timed, _room(mesh), _speeds(mesh))


def relative(step_s: Sequence[float], workers: Sequence[int]) -> tuple[float, ...]:
    """The hosts' speeds from the seconds of each worker, host after host, and the number of each host's workers.

    A host is as fast as its slowest worker. Empty: all are alike.
    """
    slowest_s, first = [], 0
    for count in workers:
        slowest_s.append(max(step_s[first : first + count]))
        first += count
    speeds = tuple(slowest_s[0] / seconds for seconds in slowest_s)
    return () if all(abs(speed - 1) < _SAME for speed in speeds) else speeds


def _speeds(mesh: Mesh) -> tuple[float, ...]:
    """Of each worker of the pipeline, which is as fast as the slowest of those that have the same stages.

    Of several hosts by products of matrices. Empty: all are alike.
    """
    everyone = mesh.everyone
    if not everyone.is_over_network:
        return ()
    one, other = (torch.ones(_PRODUCT, _PRODUCT, device=everyone.device) for _ in range(2))
    everyone.barrier("before measuring speeds")
    number, taken_s, begin_s = 0, 0.0, time.perf_counter()
    while taken_s < _PRODUCTS_S:
        torch.mm(one, other)
        number += 1
        taken_s = time.perf_counter() - begin_s
    seconds = everyone.gather_json(taken_s / number, "the hosts' speeds")
    return relative(seconds, [everyone.size // mesh.layout.pp] * mesh.layout.pp)


def _room(mesh: Mesh) -> float:
    """Parameters for which each worker has memory in any case. A collective call."""
    kind = mesh.everyone.device.type
    own = [socket.gethostname() if kind == "cpu" else mesh.everyone.rank, available_memory_bytes(kind)]
    rows = mesh.everyone.gather_json(own, "room for a stage")
    sharers = collections.Counter(place for place, _ in rows)
    least: float = min(free / sharers[place] for place, free in rows)
    return _ROOM_SHARE * least / TRAINING_BYTES
