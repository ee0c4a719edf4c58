"""Finding out, once for all layouts of a job, how its batches of images are to lie in memory."""

from __future__ import annotations

import dataclasses

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.world import World
from paceline.job import Job
from paceline.train.data import ShareLoader
from paceline.train.images import has_images
from paceline.train.replica import Replica
from paceline.train.room import TRAINING_BYTES, why_no_room
from paceline.train.session import Datasets


def agree_on_images(
    job: Job, datasets: Datasets, world: World, everyone: Group, *, seed: int, precision: str
) -> None:
    """Have rank 0 find out, and all workers' `datasets.images` take that. A collective call.

    Raises:
        PacelineError: the job fails on its first batch.
    """
    ratio = _measure(job, datasets, world, seed, precision) if world.rank == 0 else None
    datasets.images.decide(everyone.gather_json(ratio, "how images lie in memory")[0])


def _measure(job: Job, datasets: Datasets, world: World, seed: int, precision: str) -> float | None:
    """What `ImageFormat.measure` gives for the whole model, on what one worker has of a batch when all have a part."""

    def first(batch_size: int) -> object:
        small = dataclasses.replace(job, batch_size=batch_size, loader_workers=0)
        loader = ShareLoader(
            small, datasets["train"], seed=seed, micro=1, size=1, rank=0, device=world.device
        )
        return next(loader.epoch(0)).parts[0].batch

    whole = first(job.batch_size)
    if not has_images(whole) or why_no_room(job, world.device.type, TRAINING_BYTES):
        return None
    share = first(max(1, job.batch_size // world.size))
    replica = Replica(job, seed=seed, device=world.device, precision=precision, total_steps=job.steps or 1000)
    replica.attach(data_mesh(Group.alone(world.device)))
    return replica.images.measure(share if has_images(share) else whole, replica.try_out)
