"""The peer: a job trained with DistributedDataParallel, as PyTorch's documentation writes it, by turns (turns.py).

    torchrun --standalone --nproc-per-node 2 benchmarks/ddp_script.py JOB_FILE FOLDER

Only model, data, loss and optimizer come from the job. Batch statistics stay local, gradients are averaged
by DDP, the global batch is split by DistributedSampler.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, default_collate
from turns import Player

import paceline

MANY = 1_000_000


def call(replica: torch.nn.Module, accepted: set[str], batch: object) -> object:
    """The model on a batch: a dict's entries by name, the first of a list, all of a tuple of inputs."""
    if isinstance(batch, dict):
        return replica(**{key: value for key, value in batch.items() if key in accepted})
    if isinstance(batch, list):
        return replica(batch[0])
    return replica(*batch) if isinstance(batch, tuple) else replica(batch)


def epochs(loader: DataLoader, sampler: DistributedSampler) -> Iterator[object]:
    for epoch in itertools.count():
        sampler.set_epoch(epoch)
        yield from loader


def main() -> None:
    job = paceline.load_job(sys.argv[1])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = job.model()
    accepted = set(inspect.signature(model.forward).parameters)
    replica = DistributedDataParallel(model)
    optimizer = job.optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = job.schedule(optimizer, MANY) if job.schedule else None
    dataset = job.data("train")
    sampler = DistributedSampler(dataset, shuffle=True, seed=0)
    own_samples = job.batch_size // dist.get_world_size()
    loader = DataLoader(
        dataset,
        batch_size=own_samples,
        num_workers=job.loader_workers,
        sampler=sampler,
        collate_fn=job.collate or default_collate,
        drop_last=True,
    )
    player = Player(Path(sys.argv[2]), dist.get_rank(), dist.barrier)
    batches = epochs(loader, sampler)
    for steps in player.turns():
        for batch in itertools.islice(batches, steps):
            outputs = call(replica, accepted, job.inputs(batch) if job.inputs else batch)
            loss = job.loss(outputs, batch)
            if isinstance(loss, tuple):
                loss = loss[0] / loss[1]
            optimizer.zero_grad()
            loss.backward()
            if job.clip_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), job.clip_norm)
            optimizer.step()
            if scheduler is not None:
                scheduler.step()
            loss.item()  # a script logs it
            player.stepped(own_samples * dist.get_world_size())
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
