"""The peers in PyTorch: a job trained as each one's documentation writes it, by turns (turns.py).

    torchrun --standalone --nproc-per-node 2 benchmarks/peer_script.py PEER JOB_FILE FOLDER

PEER is one of PEERS below. Model, data, loss, optimizer, schedule and clipping come from the job; the weights that
training begins with and the samples of each global batch are those that paceline would take under the same seed.
Gradients are averaged by the peer, and batch statistics stay local, as they do on CPUs. `one` is a plain loop in one
process, and `bound` the same loop in several that never meet, each on its share of the batch: what no way to
split the batch can beat.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader, default_collate
from turns import Player

import paceline
from paceline.train.matmul import ONEDNN, use_onednn, wanted_library
from paceline.train.order import cut, epoch_order
from paceline.train.seeds import derive, seed_everything
from paceline.train.session import Datasets

SEED = 0
MANY = 1_000_000


@dataclasses.dataclass(frozen=True)
class Trainer:
    """A job in the hands of a peer."""

    call: Callable[..., Any]
    """The model, as it is to be called."""
    update: Callable[[torch.Tensor], object]
    """`(loss)`: gradients, clipped if the job says so, and one step of the optimizer and its schedule."""


def seeded_model(job: paceline.Job) -> nn.Module:
    seed_everything(derive(SEED, "model"))
    return job.model()


def batches(job: paceline.Job, dataset: Any, rank: int, size: int) -> Iterator[Any]:
    """This rank's share of each global batch, epoch after epoch, without an incomplete last one."""
    begin, end = cut(job.batch_size, size)[rank]
    for epoch in itertools.count():
        order = epoch_order(SEED, epoch, len(dataset)).tolist()
        shares = [
            order[first + begin : first + end]
            for first in range(0, len(order) - job.batch_size + 1, job.batch_size)
        ]
        yield from DataLoader(
            dataset,
            batch_sampler=shares,
            num_workers=job.loader_workers,
            collate_fn=job.collate or default_collate,
        )


def scheduler_of(job: paceline.Job, optimizer: torch.optim.Optimizer) -> Any:
    return job.schedule(optimizer, MANY) if job.schedule else None


def trained(model: nn.Module) -> list[nn.Parameter]:
    return [p for p in model.parameters() if p.requires_grad]


def plain(
    job: paceline.Job,
    call: nn.Module,
    optimizer: torch.optim.Optimizer,
    backward: Callable[[torch.Tensor], object] = torch.Tensor.backward,
    clip: Callable[[float], object] | None = None,
) -> Trainer:
    """The loop that every PyTorch script has; backward and clipping may be the peer's."""
    scheduler = scheduler_of(job, optimizer)
    parameters = trained(call)

    def update(loss: torch.Tensor) -> None:
        backward(loss)
        if job.clip_norm is not None:
            if clip is None:
                nn.utils.clip_grad_norm_(parameters, job.clip_norm)
            else:
                clip(job.clip_norm)
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()

    return Trainer(call, update)


def one(job: paceline.Job, model: nn.Module) -> Trainer:
    return plain(job, model, job.optimizer(trained(model)))


def ddp(job: paceline.Job, model: nn.Module) -> Trainer:
    replica = nn.parallel.DistributedDataParallel(model)
    return plain(job, replica, job.optimizer(trained(model)))


def fsdp2(job: paceline.Job, model: nn.Module) -> Trainer:
    """`fully_shard` of each block of the model's lists, then of what is left; the optimizer comes after it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for module in list(model.modules()):
        if isinstance(module, nn.ModuleList):
            for block in module:
                fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return plain(job, model, job.optimizer(trained(model)))


def zero_redundancy(job: paceline.Job, model: nn.Module) -> Trainer:
    """DDP, with the job's optimizer sharded: it wants the class and its arguments, not an optimizer."""
    from torch.distributed.optim import ZeroRedundancyOptimizer

    replica = nn.parallel.DistributedDataParallel(model)
    example = job.optimizer(trained(model))
    accepted = inspect.signature(type(example)).parameters
    arguments = {key: value for key, value in example.defaults.items() if key in accepted}
    optimizer = ZeroRedundancyOptimizer(trained(model), optimizer_class=type(example), **arguments)
    return plain(job, replica, optimizer)


def accelerate(job: paceline.Job, model: nn.Module) -> Trainer:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    replica, optimizer = accelerator.prepare(model, job.optimizer(trained(model)))
    parameters = trained(model)

    def clip(norm: float) -> None:
        accelerator.clip_grad_norm_(parameters, norm)

    return plain(job, replica, optimizer, accelerator.backward, clip)


def fabric(job: paceline.Job, model: nn.Module) -> Trainer:
    from lightning_fabric import Fabric

    lightning = Fabric(accelerator="cpu", devices=dist.get_world_size(), strategy="ddp")
    lightning.launch()
    replica, optimizer = lightning.setup(model, job.optimizer(trained(model)))

    def clip(norm: float) -> None:
        lightning.clip_gradients(replica, optimizer, max_norm=norm)

    return plain(job, replica, optimizer, lightning.backward, clip)


def deepspeed_zero1(job: paceline.Job, model: nn.Module) -> Trainer:
    import deepspeed

    optimizer = job.optimizer(trained(model))
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        lr_scheduler=scheduler_of(job, optimizer),
        config={
            "train_batch_size": job.batch_size,
            "train_micro_batch_size_per_gpu": job.batch_size // dist.get_world_size(),
            "gradient_clipping": job.clip_norm or 0.0,
            "zero_optimization": {"stage": 1},
            "zero_allow_untested_optimizer": True,
        },
    )

    def update(loss: torch.Tensor) -> None:
        engine.backward(loss)
        engine.step()

    return Trainer(engine, update)


PEERS = {
    "one": one,
    "bound": one,
    "ddp": ddp,
    "fsdp2": fsdp2,
    "zero": zero_redundancy,
    "accelerate": accelerate,
    "fabric": fabric,
    "deepspeed": deepspeed_zero1,
}
ALONE = ("one", "bound")


def call(trainer: Trainer, accepted: set[str], batch: Any) -> Any:
    """The model on a batch: a dict's entries by name, the first of a list, all of a tuple of inputs."""
    if isinstance(batch, dict):
        return trainer.call(**{key: value for key, value in batch.items() if key in accepted})
    if isinstance(batch, list):
        return trainer.call(batch[0])
    return trainer.call(*batch) if isinstance(batch, tuple) else trainer.call(batch)


def contribution(loss: Any, size: int) -> torch.Tensor:
    """What the peer's mean over ranks makes the global loss of: a weighted sum is divided by the global weight."""
    if not isinstance(loss, tuple):
        return loss
    total, weight = loss
    weight = torch.as_tensor(weight, dtype=total.dtype).detach().clone()
    if size > 1:
        dist.all_reduce(weight)
    return total * (size / weight)


@contextlib.contextmanager
def without_dropout(model: nn.Module) -> Iterator[None]:
    """Dropout of probability zero within."""
    layers = [m for m in model.modules() if isinstance(m, nn.modules.dropout._DropoutNd)]
    probabilities = [layer.p for layer in layers]
    try:
        for layer in layers:
            layer.p = 0.0
        yield
    finally:
        for layer, p in zip(layers, probabilities, strict=True):
            layer.p = p


def main() -> None:
    peer, job, folder = sys.argv[1], paceline.load_job(sys.argv[2]), Path(sys.argv[3])
    dist.init_process_group("gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    model = seeded_model(job)
    accepted = set(inspect.signature(model.forward).parameters)
    if peer == "bound" and wanted_library() == ONEDNN:
        use_onednn(True)
    trainer = PEERS[peer](job, model)
    averaged_over = 1 if peer in ALONE else size
    share = job.batch_size // size
    player = Player(folder, rank, dist.barrier)
    stream = batches(job, Datasets(job, SEED)["train"], rank, size)
    for turn in player.turns():
        with without_dropout(model) if turn.compared else contextlib.nullcontext():
            for batch in itertools.islice(stream, turn.steps):
                outputs = call(trainer, accepted, job.inputs(batch) if job.inputs else batch)
                loss = contribution(job.loss(outputs, batch), averaged_over)
                trainer.update(loss)
                value = loss.detach()
                if turn.compared:
                    dist.all_reduce(value)
                    value /= size
                value = value.item()  # a script logs it
                player.stepped(share * size, value if turn.compared else None)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
