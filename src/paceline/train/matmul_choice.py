"""Finding out, once for all layouts of a job, which library is to multiply its matrices."""

from __future__ import annotations

from collections.abc import Callable

from paceline.comm.group import Group
from paceline.comm.mesh import data_mesh
from paceline.comm.world import World
from paceline.job import Job
from paceline.train.data import is_iterable
from paceline.train.matmul import AUTO, ONEDNN, is_available, may_be_large, wanted_library
from paceline.train.profiling import first_samples
from paceline.train.room import TRAINING_BYTES, why_no_room
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure


def agree_on_matmul(
    job: Job,
    datasets: Datasets,
    world: World,
    everyone: Group,
    *,
    seed: int,
    once: Callable[[Callable[[], float | None]], float | None] = lambda find: find(),
) -> None:
    """Have rank 0 find out, in fp32, and all workers' `datasets.matmul` take that. A collective call.

    Of an iterable data set nothing is read beforehand: it is left to torch.

    Args:
        once: on rank 0, gives what the function that it is given finds, or what that has found before.

    Raises:
        PacelineError: the job fails on its first batch.
    """
    is_possible = world.device.type == "cpu" and is_available()
    wanted = wanted_library()
    ratio = None
    if world.rank == 0 and is_possible:
        if wanted == ONEDNN:
            ratio = 1.0
        elif wanted == AUTO and not is_iterable(datasets["train"]):
            ratio = once(lambda: _measure(job, datasets, world, seed))
    found = everyone.gather_json([is_possible, ratio], "which library multiplies matrices")
    datasets.matmul.decide(found[0][1] if all(possible for possible, _ in found) else None)


def _measure(job: Job, datasets: Datasets, world: World, seed: int) -> float | None:
    """What `Matmul.measure` gives for the whole model, on what one worker has of a batch when all have a part."""
    if why_no_room(job, world.device.type, TRAINING_BYTES):
        return datasets.matmul.measure_large()
    # Two samples at least: batch norm has no statistics of one alone.
    share = first_samples(job, datasets["train"], max(2, job.batch_size // world.size), world.device)
    replica = replica_to_measure(job, datasets, seed=seed, device=world.device, precision="fp32")
    if not may_be_large(replica.model, share):
        return None
    replica.attach(data_mesh(Group.alone(world.device)))
    return datasets.matmul.measure(lambda: replica.try_out(share))
