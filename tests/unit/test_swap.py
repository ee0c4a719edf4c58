"""An optimizer that is given other parameters keeps its groups, their settings and its state."""

from __future__ import annotations

import torch
from torch import nn

from paceline.split.swap import swap_parameters


def test_groups_settings_and_state_go_with_the_parameters():
    a, b, c = (nn.Parameter(torch.arange(4.0) + 10 * i) for i in range(3))
    optimizer = torch.optim.Adagrad(
        [{"params": [a, b], "lr": 0.5}, {"params": [c], "lr": 0.1}], initial_accumulator_value=2.0
    )
    groups = list(optimizer.param_groups)
    optimizer.state[a]["sum"][:] = torch.arange(4.0)
    piece = nn.Parameter(a.detach()[1:3].clone())
    swap_parameters(optimizer, {a: (piece, lambda t: t[1:3].clone()), c: None})
    assert all(new is old for new, old in zip(optimizer.param_groups, groups, strict=True))
    assert optimizer.param_groups[0]["params"][0] is piece
    assert optimizer.param_groups[0]["params"][1] is b
    assert optimizer.param_groups[1]["params"] == []
    assert optimizer.state[piece]["sum"].tolist() == [1.0, 2.0]
    assert optimizer.state[piece]["step"].shape == ()
    assert a not in optimizer.state
    assert c not in optimizer.state
    piece.grad = torch.ones(2)
    optimizer.step()
    assert torch.allclose(piece, torch.tensor([1.0, 2.0]) - 0.5 / torch.tensor([2.0, 3.0]).sqrt())
