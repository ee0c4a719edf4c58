"""How fast the hosts of a cluster are, measured by the job itself."""

from __future__ import annotations

import time

import torch

from paceline.comm.group import Group
from paceline.comm.threads import take_cores
from paceline.comm.world import World
from paceline.job import Job
from paceline.records import Cluster
from paceline.train.block_costs import BlockCosts
from paceline.train.cutting import relative
from paceline.train.data import ShareLoader
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure

_BUDGET_S = 0.6
_FEWEST = 3
"""Steps of the slowest."""


def measure_speeds(
    job: Job,
    datasets: Datasets,
    world: World,
    everyone: Group,
    cluster: Cluster,
    *,
    seed: int,
    blocks: BlockCosts | None = None,
) -> tuple[float, ...]:
    """Of each host, relative to the first; empty: all equally fast. A collective call of all workers.

    All workers train at once, each by itself; a host is as fast as its slowest worker. Of the steps the mean counts,
    not the median: a host with a quota of processor time runs at full speed until it is spent, and then not at all.

    Args:
        blocks: passes of one of these are taken in place of steps; None: the whole model trains.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    if len(cluster.hosts) == 1:
        return ()
    take_cores(world.local_rank, world.local_size)
    own_s = _step_s(job, datasets, world, everyone, seed) if blocks is None else _pass_s(blocks, everyone)
    rows = everyone.gather(
        torch.tensor([own_s], dtype=torch.float64, device=world.device), "the hosts' speeds"
    )
    return relative(rows.view(-1).tolist(), [host.workers for host in cluster.hosts])


def _pass_s(blocks: BlockCosts, everyone: Group) -> float:
    """Seconds of this worker for a pass of a block, beside all others."""
    everyone.barrier("before measuring speeds")
    number, taken_s = blocks.work_for(_BUDGET_S)
    return taken_s / number


def _step_s(job: Job, datasets: Datasets, world: World, everyone: Group, seed: int) -> float:
    """Seconds of this worker for a step of a whole batch, beside all others."""
    replica = replica_to_measure(job, datasets, seed=seed, device=world.device, precision="fp32")
    loader = ShareLoader(job, datasets["train"], seed=seed, micro=1, size=1, rank=0, device=world.device)
    batches = loader.endless()
    for _ in range(2):
        replica.step(next(batches))
    everyone.barrier("before measuring speeds")
    samples, num_steps, taken_s = 0, 0, 0.0
    begin_s = time.perf_counter()
    while num_steps < _FEWEST or taken_s < _BUDGET_S:
        samples += replica.step(next(batches)).samples
        num_steps += 1
        taken_s = time.perf_counter() - begin_s
    # The last batch of an epoch may be smaller than the others.
    return taken_s * job.batch_size / samples
