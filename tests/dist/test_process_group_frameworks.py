"""What PyTorch builds on process groups runs on the backend `shm`, and computes what one process computes."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from shm_groups import run_shm
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.pipelining import PipelineStage, Schedule1F1B
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import paceline.comm.process_group as shm

pytestmark = pytest.mark.shared_memory

WIDTH, BATCH, STEPS = 16, 8, 3


def build() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(WIDTH, 32), nn.Tanh(), nn.Linear(32, WIDTH), nn.BatchNorm1d(WIDTH, affine=False)
    )


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(1)
    return [tuple(torch.randn(2, BATCH, WIDTH, generator=generator)) for _ in range(STEPS)]


def train(model: nn.Module, share: slice) -> list[float]:
    """A few steps on a share of each batch; the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    losses = []
    for inputs, targets in batches():
        loss = nn.functional.mse_loss(model(inputs[share]), targets[share])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def check_is_one_process(model: nn.Module, alone: nn.Module) -> None:
    for (name, value), wanted in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        torch.testing.assert_close(whole(value), wanted, rtol=1e-4, atol=1e-5, msg=name)


def plain() -> nn.Sequential:
    """Without batch norm, whose statistics depend on the share."""
    return build()[:3]


def share_of(rank: int) -> slice:
    return slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)


def ddp(rank: int, size: int) -> None:
    alone, model = plain(), plain()
    if rank == 1:
        # DDP gives everyone the parameters of rank 0.
        nn.init.zeros_(model[0].weight)
    wrapped = DistributedDataParallel(model, bucket_cap_mb=0.001)
    train(wrapped, share_of(rank))
    train(alone, slice(None))
    check_is_one_process(model, alone)
    # Buffers are broadcast, and gradients are kept apart until the last of several backward passes.
    normed = DistributedDataParallel(build())
    with normed.no_sync():
        normed(batches()[0][0][share_of(rank)]).sum().backward()
    normed(batches()[0][0][share_of(rank)]).sum().backward()


def fsdp(rank: int, size: int, mode: str) -> None:
    alone, model = plain(), plain()
    if mode == "shards":
        mesh = init_device_mesh("cpu", (2,))
    else:
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "shards"))
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    train(model, share_of(rank))
    train(alone, slice(None))
    check_is_one_process(model, alone)


def tensor_parallel(rank: int, size: int) -> None:
    alone, model = plain(), plain()
    mesh = init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    assert model[0].weight.to_local().shape == (16, WIDTH)
    losses = train(model, slice(None))
    torch.testing.assert_close(losses, train(alone, slice(None)))
    check_is_one_process(model, alone)


def pipeline(rank: int, size: int) -> None:
    alone = plain()
    parts = (copy.deepcopy(alone[:2]), copy.deepcopy(alone[2:]))
    stage = PipelineStage(parts[rank], rank, size, torch.device("cpu"))
    schedule = Schedule1F1B(stage, 4, loss_fn=nn.functional.mse_loss)
    inputs, targets = batches()[0]
    losses: list[torch.Tensor] = []
    schedule.step(inputs) if rank == 0 else schedule.step(target=targets, losses=losses)
    nn.functional.mse_loss(alone(inputs), targets).backward()
    for own, wanted in zip(parts[rank].parameters(), (alone[:2], alone[2:])[rank].parameters(), strict=True):
        torch.testing.assert_close(own.grad, wanted.grad)
    if rank == 1:
        assert len(losses) == 4


def checkpoints(rank: int, size: int, folder: str) -> None:
    model = plain()
    mesh: DeviceMesh = init_device_mesh("cpu", (2,))
    fully_shard(model, mesh=mesh)
    train(model, share_of(rank))
    checkpoint.save(model.state_dict(), checkpoint_id=folder)
    fresh = plain()
    parallelize_module(fresh, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    state = fresh.state_dict()
    checkpoint.load(state, checkpoint_id=folder)
    fresh.load_state_dict(state)
    for value, wanted in zip(fresh.state_dict().values(), model.state_dict().values(), strict=True):
        assert torch.equal(whole(value), whole(wanted))


def on_shm(rank: int, size: int, function, *arguments) -> bool:
    function(rank, size, *arguments)
    # It was not gloo after all.
    assert isinstance(dist.group.WORLD, shm.SharedMemoryGroup)
    assert shm.records()[rank]
    return True


@pytest.mark.parametrize(
    ("function", "arguments"),
    [(ddp, ()), (fsdp, ("shards",)), (fsdp, ("shards and copies",)), (tensor_parallel, ()), (pipeline, ())],
    ids=lambda value: getattr(value, "__name__", " ".join(value) if isinstance(value, tuple) else str(value)),
)
def test_it_computes_what_one_process_computes(function, arguments):
    assert run_shm(on_shm, 2, function, *arguments) == [True, True]


def test_a_checkpoint_of_one_layout_is_read_by_another(tmp_path: Path):
    assert run_shm(on_shm, 2, checkpoints, str(tmp_path)) == [True, True]
