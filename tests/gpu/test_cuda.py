"""What needs a CUDA device: the proof of layouts on it, and models that are built in parts there."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from paceline.comm.mesh import make_mesh
from paceline.comm.world import join
from paceline.records import Layout
from paceline.split import deferred as deferred_module
from paceline.train.build import build_model
from paceline.train.proof import prove
from paceline.train.session import Datasets, Session

sys.path.insert(0, str(Path(__file__).parents[1] / "dist"))
from split_jobs import SPLIT_JOBS

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
JOBS = ("transformer", "unet", "torch_encoder", "batch_norm", "weighted", "tied")


@pytest.mark.parametrize("layout", ["dp_replicate=1", "recompute=full", "recompute=selective"])
@pytest.mark.parametrize("name", JOBS)
def test_layouts_of_one_worker_are_proven(name, layout):
    job, micro = SPLIT_JOBS[name]
    world = join("cuda", timeout_s=60)
    try:
        mesh = make_mesh(world, Layout.parse(f"{layout},micro={micro}"))
        assert mesh is not None
        proof = prove(job, mesh, Datasets(job, 7), seed=7, device=world.device)
        assert proof.status == "equal", proof.what_differs
    finally:
        world.leave()


@pytest.mark.parametrize("name", JOBS)
def test_a_model_built_in_parts_has_the_numbers_of_a_plain_one(name, monkeypatch):
    monkeypatch.setattr(deferred_module, "LEAST_BYTES", 64)
    job = SPLIT_JOBS[name][0]
    device = torch.device("cuda", 0)
    whole, _ = build_model(job, 7, device, None, in_parts=False)
    model, deferred = build_model(job, 7, device, None, in_parts=True)
    assert len(deferred) > 0
    for (key, tensor), other in zip(model.named_parameters(), whole.parameters(), strict=True):
        with deferred.filled([tensor]):
            assert tensor.device.type == "cuda"
            assert torch.equal(tensor, other), key


def test_bf16_trains():
    job = dataclasses.replace(SPLIT_JOBS["transformer"][0], steps=20, epochs=None)
    with Session(job, "dp_replicate=1", precision="bf16") as session:
        losses = [session.step(batch).loss for batch in session.batches()]
    assert losses[-1] < losses[0]
