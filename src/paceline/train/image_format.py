"""Finding out, once for all layouts of a job, how its batches of images are to lie in memory."""

from __future__ import annotations

from collections.abc import Callable

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.world import World
from paceline.job import Job
from paceline.train.data import FEW_TOGETHER, is_iterable, repeated
from paceline.train.images import has_images
from paceline.train.profiling import first_samples
from paceline.train.room import TRAINING_BYTES, why_no_room
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure


def agree_on_images(
    job: Job,
    datasets: Datasets,
    world: World,
    everyone: Group,
    *,
    seed: int,
    precision: str,
    once: Callable[[Callable[[], float | None]], float | None] = lambda find: find(),
) -> None:
    """Have rank 0 find out, and all workers' `datasets.images` take that. A collective call.

    Of an iterable data set nothing is read beforehand: each worker takes its share of one stream. There whole models
    find out in their first step, and the others leave images as they come.

    Args:
        once: on rank 0, gives what the function that it is given finds, or what that has found before.

    Raises:
        PacelineError: the job fails on its first batch.
    """
    if is_iterable(datasets["train"]):
        return
    ratio = once(lambda: _measure(job, datasets, world, seed, precision)) if world.rank == 0 else None
    datasets.images.decide(everyone.gather_json(ratio, "how images lie in memory")[0])


def _measure(job: Job, datasets: Datasets, world: World, seed: int, precision: str) -> float | None:
    """What `ImageFormat.measure` gives for the whole model, on what one worker has of a batch when all have a part."""
    train = datasets["train"]
    few = first_samples(job, train, FEW_TOGETHER, world.device)
    if not has_images(repeated(few, job.batch_size)) or why_no_room(job, world.device.type, TRAINING_BYTES):
        return None
    replica = replica_to_measure(job, datasets, seed=seed, device=world.device, precision=precision)
    replica.attach(data_mesh(Group.alone(world.device)))
    # Two samples at least: batch norm has no statistics of one alone.
    share = first_samples(job, train, max(2, job.batch_size // world.size), world.device)
    whole = share if has_images(share) else first_samples(job, train, job.batch_size, world.device)
    return replica.images.measure(whole, replica.try_out)
