"""Whether each worker can measure a job with its whole model, or the model is to be measured block by block."""

from __future__ import annotations

import gc

import torch

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.job import Job
from paceline.measure.machine import (
    available_memory_bytes,
    describe_host,
    held_memory_bytes,
    launcher_memory_bytes,
)
from paceline.train.allocator import give_back_freed_memory
from paceline.train.block_costs import state_per_byte
from paceline.train.data import FEW_TOGETHER
from paceline.train.passes import Passes
from paceline.train.profiling import first_samples
from paceline.train.room import TRAINING_BYTES, why_no_room
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure
from paceline.train.walk import Walk

MOST_SHARE = 0.75
"""Of a worker's memory that its whole model may take while it is measured, with all that training it needs. The rest is
for temporaries, for what an allocator keeps, and for what the estimate does not see."""
_QUICKLY = 8
"""So many times the memory that training takes must be free for the model to be built whole for its estimate."""


def why_block_by_block(
    job: Job, datasets: Datasets, world: World, everyone: Group, *, seed: int, precision: str
) -> str:
    """Why the model cannot be measured whole by all workers of a host at once; empty if it can. A collective call.

    Raises:
        PacelineError: the job cannot be built, or fails on a few samples.
    """
    rooms = everyone.gather_json(_room_bytes(world), "memory for a worker")
    room = min((r for r in rooms if r), default=0)
    why = None
    if world.rank == 0:
        needed = _needed_bytes(job, datasets, world.device, int(room * MOST_SHARE), seed, precision)
        why = ""
        if room and needed > room * MOST_SHARE:
            why = (
                f"training the whole model takes about {needed / 2**20:,.0f} MiB, and each worker has "
                f"{room / 2**20:,.0f} MiB, of which {1 - MOST_SHARE:.0%} are left free"
            )
    found: str = everyone.gather_json(why, "how to measure the model")[0]
    return found


def _room_bytes(world: World) -> int:
    """What this worker may have in all; 0: that is not known.

    Its share of its host's memory, and no more than what it has with its share of what is free now.
    """
    kind, workers = world.device.type, world.local_size
    whole = describe_host(kind, workers).memory_bytes
    free, held = available_memory_bytes(kind), held_memory_bytes(kind)
    if kind == "cpu":
        whole -= launcher_memory_bytes()
        free //= workers
    return min(whole // workers, free + held) if free else whole // workers


def _needed_bytes(
    job: Job, datasets: Datasets, device: torch.device, most: int, seed: int, precision: str
) -> int:
    """About what one process holds that trains the whole model on whole batches.

    Args:
        most: what it may; activations are not looked at where parameters, gradients and the optimizer's state are more.
    """
    base = held_memory_bytes(device.type)
    in_parts = bool(why_no_room(job, device.type, _QUICKLY * TRAINING_BYTES))
    replica = replica_to_measure(
        job, datasets, seed=seed, device=device, precision=precision, in_parts=in_parts
    )
    parameters = list(replica.model.parameters())
    trained = sum(p.nbytes for p in parameters if p.requires_grad)
    needed = base + sum(p.nbytes for p in parameters) + trained + round(trained * state_per_byte(replica))
    if needed <= most:
        few = first_samples(job, datasets["train"], FEW_TOGETHER, device)
        if in_parts:
            walk = Walk(job, replica)
            walk.first(few, FEW_TOGETHER)
            calls = walk.calls
            del walk  # it has the model
        else:
            calls = Passes(job, replica, device).describe(few, FEW_TOGETHER)
        needed += round(sum(call.saved_bytes for call in calls) * job.batch_size)
    del replica, parameters
    gc.collect()
    give_back_freed_memory()
    return needed
