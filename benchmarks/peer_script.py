"""The peers: a job trained as PyTorch's documentation writes it, by turns (turns.py).

    torchrun --standalone --nproc-per-node 2 benchmarks/peer_script.py PEER JOB_FILE FOLDER

PEER is `ddp` (DistributedDataParallel) or `fsdp2` (fully_shard, of each block of the model's lists, then of the rest).
Only model, data, loss and optimizer come from the job. Batch statistics stay local, gradients are averaged by the peer,
the global batch is split by DistributedSampler.
"""

from __future__ import annotations

import inspect
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
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


def shard_blocks(model: torch.nn.Module) -> torch.nn.Module:
    """FSDP2: each block of a list, then what is left."""
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, torch.nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


PEERS = {"ddp": DistributedDataParallel, "fsdp2": shard_blocks}


def main() -> None:
    job = paceline.load_job(sys.argv[2])
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = job.model()
    accepted = set(inspect.signature(model.forward).parameters)
    replica = PEERS[sys.argv[1]](model)
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
    player = Player(Path(sys.argv[3]), dist.get_rank(), dist.barrier)
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
