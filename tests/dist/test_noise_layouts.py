"""The gradient noise scale is the same in every layout with the same parts, and measuring it changes nothing."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from groups import run_group
from jobs import Images, Sentences, convolutional, data_of, padded_loss, plain
from split_jobs import SPLIT_JOBS, sentences
from torch import nn

from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.split import deferred
from paceline.train import noise
from paceline.train.session import Session

JOBS = {
    "deep": SPLIT_JOBS["deep"][0],
    "shared": SPLIT_JOBS["shared"][0],
    "tied": sentences,
    "batch_norm": dataclasses.replace(plain, model=convolutional, data=data_of(Images)),
    # Parts count for their tokens, which are not equally many.
    "weighted": dataclasses.replace(
        plain,
        model=lambda: nn.Sequential(
            nn.Embedding(16, 12), *(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4)), nn.Linear(12, 16)
        ),
        data=data_of(Sentences),
        loss=padded_loss,
        metrics={},
        clip_norm=0.5,
    ),
}  # fmt: skip
COMPARED = {
    ("deep", 2): ("dp_replicate=1,micro=2", "dp_replicate=2", "dp_replicate=2 gloo", "tp=2,micro=2", "dp_shard=2,zero=1"),
    ("deep", 4): ("dp_replicate=1,micro=4", "dp_replicate=2,micro=2", "pp=2,micro=4,schedule=interleaved"),
    ("weighted", 2): ("dp_replicate=1,micro=2", "dp_replicate=2", "pp=2,micro=2"),
    ("weighted", 4): ("dp_replicate=1,micro=4", "pp=2,micro=4,schedule=zb-h1", "dp_shard=2,zero=3,micro=2"),
    ("shared", 2): ("dp_replicate=1,micro=2", "dp_shard=2,zero=3"),
}  # fmt: skip
"""By job and number of parts."""
CHANGED = ("dp_replicate=2", "dp_shard=2,zero=3,micro=2", "pp=2,micro=2,schedule=zb-h1")


def train(world: World, name: str, text: str, *, measure_noise: bool = True) -> Any:
    """What was measured, and the weights in the end."""
    if text.endswith(" gloo"):
        world = dataclasses.replace(world, transport="gloo", groups={})
    layout = Layout.parse(text.removesuffix(" gloo"))
    mesh = make_mesh(world, layout)
    if mesh is None:
        return [], [], ""
    session = Session(JOBS[name], layout, seed=7, world=world, mesh=mesh, measure_noise=measure_noise)
    results = [session.step(batch) for batch in session.batches(steps=6)]
    found = [result.noise.measured for result in results if result.noise is not None]
    weights = {name: tensor.clone() for name, tensor in session.whole_state() if tensor is not None}
    return found, weights, session.what_noise_lacks


def work(world: World) -> Any:
    deferred.LEAST_BYTES = 64
    noise.SHARE = 1e9  # every second step
    compared = {
        f"{name}/{text}": train(world, name, text)[0] for (name, _), texts in COMPARED.items() for text in texts
    }
    changed = {
        text: [train(world, "weighted", text, measure_noise=measures)[1] for measures in (True, False)]
        for text in CHANGED
    }
    lacking = {
        text: train(world, "tied", text)[2] for text in ("pp=2,micro=2", "pp=2", "dp_replicate=1", "dp_shard=2")
    }
    lacking["batch norm"] = train(world, "batch_norm", "dp_replicate=2,micro=2")
    return compared, changed, lacking


@pytest.fixture(scope="module")
def found() -> dict[int, Any]:
    return run_group(work, 2)


@pytest.mark.parametrize(("name", "parts"), COMPARED)
def test_layouts_with_the_same_parts_measure_the_same(name, parts, found):
    compared = found[0][0]
    first, *others = COMPARED[name, parts]
    wanted = compared[f"{name}/{first}"]
    # Batch 4 is the epoch's uneven last one.
    assert [(m.step, m.samples, m.parts) for m in wanted] == [(2, 24, parts), (5, 24, parts)]
    for text in others:
        measured = compared[f"{name}/{text}"]
        assert [(m.step, m.samples, m.parts) for m in measured] == [(2, 24, parts), (5, 24, parts)], text
        for own, other in zip(measured, wanted, strict=True):
            assert own.trace == pytest.approx(other.trace, rel=1e-4), text
            assert own.squared_gradient == pytest.approx(other.squared_gradient, rel=1e-4), text


@pytest.mark.parametrize("text", CHANGED)
def test_measuring_does_not_change_a_bit_of_what_is_trained(text, found):
    measuring, not_measuring = found[0][1][text]
    assert measuring.keys() == not_measuring.keys()
    assert len(measuring) > 10
    for name, tensor in measuring.items():
        assert torch.equal(tensor, not_measuring[name]), name


def test_all_workers_learn_the_same(found):
    for key, measured in found[1][0].items():
        if measured:
            assert measured == found[0][0][key], key


def test_what_cannot_be_measured_is_said(found):
    lacking = found[0][2]
    assert lacking["dp_shard=2"] == ""
    assert lacking["pp=2,micro=2"] == "parameters that several stages have are left out: embedding.weight"
    assert "--layout dp_replicate=1,micro=2 has more" in lacking["dp_replicate=1"]
    assert "--layout pp=2,micro=2 has more" in lacking["pp=2"]
    measured, _, why = lacking["batch norm"]
    assert measured == []
    assert "batch norm takes its statistics over all workers" in why
