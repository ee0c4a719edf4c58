"""Gradients that are added up over a network, while the backward pass goes on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from groups import run_group
from torch import nn

from paceline.comm.gradients import GradientSync
from paceline.comm.world import World

_WIDTH, _LAYERS = 600, 4
"""A layer's gradients are more than a bucket."""


def _model() -> nn.ModuleList:
    torch.manual_seed(0)
    return nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(_LAYERS))


def _loss(layers: nn.ModuleList, rank: int, micro: int) -> torch.Tensor:
    """The third layer is used by nobody, the second by rank 0 alone."""
    x = torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(10 * rank + micro))
    for at, layer in enumerate(layers):
        if at == 2 or (at == 1 and rank > 0):
            continue
        x = torch.tanh(layer(x))
    return x.square().sum()


def reduce(world: World) -> dict[str, Any]:
    group = world.group(world.size)
    assert group is not None
    layers = _model()
    sync = GradientSync(list(layers.parameters()), group, num_sums=1)
    started: list[int] = []
    start_sum = group.start_sum
    group.start_sum = lambda tensor, what: (started.append(tensor.numel()), start_sum(tensor, what))[1]
    for micro in range(2):
        sync.begin_backward(last=micro == 1)
        _loss(layers, world.rank, micro).backward()
        if micro == 0:
            assert not started
    before_the_end = len(started)
    sums = sync.finish(torch.tensor([2.0]), 0)
    gradients = [None if p.grad is None else p.grad.clone() for p in layers.parameters()]
    return {"early": before_the_end, "all": len(started), "sum": float(sums), "gradients": gradients}


@pytest.mark.parametrize("size", [2, 3])
def test_buckets_travel_during_the_last_backward_pass_and_give_the_same(size):
    found = run_group(reduce, size, per_host=1)
    whole: list[torch.Tensor | None] = [None] * (2 * _LAYERS)
    for rank in range(size):
        layers = _model()
        for micro in range(2):
            _loss(layers, rank, micro).backward()
        for at, parameter in enumerate(layers.parameters()):
            if parameter.grad is not None:
                whole[at] = parameter.grad if whole[at] is None else whole[at] + parameter.grad
    for rank in range(size):
        assert 1 <= found[rank]["early"] < found[rank]["all"]
        assert found[rank]["sum"] == 2.0 * size
        for got, expected, first in zip(found[rank]["gradients"], whole, found[0]["gradients"], strict=True):
            if expected is None:
                assert got is None
                continue
            torch.testing.assert_close(got, expected / (2.0 * size))
            assert torch.equal(got, first)
