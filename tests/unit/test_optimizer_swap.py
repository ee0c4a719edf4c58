"""An optimizer goes on with other parameters, and everything else about it stays."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.split.swap import swap_parameters


def first_row(tensor: torch.Tensor) -> torch.Tensor:
    return tensor[0].clone()


@pytest.fixture
def parameters() -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(shape)) for shape in ((2, 3), (3,), (4, 2))]


def test_groups_keep_their_settings_and_their_dicts(parameters):
    matrix, bias, other = parameters
    optimizer = torch.optim.AdamW(
        [{"params": [matrix, other], "weight_decay": 0.1}, {"params": [bias], "lr": 0.3, "betas": (0.5, 0.6)}]
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    dicts = list(optimizer.param_groups)
    settings = [{key: value for key, value in group.items() if key != "params"} for group in dicts]
    piece = nn.Parameter(first_row(matrix.detach()))
    swap_parameters(optimizer, {matrix: (piece, first_row), bias: None})
    assert all(now is before for now, before in zip(optimizer.param_groups, dicts, strict=True))
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == settings
    assert optimizer.param_groups[0]["params"][0] is piece
    assert optimizer.param_groups[0]["params"][1] is other
    assert optimizer.param_groups[1]["params"] == []
    piece.grad, other.grad, bias.grad = torch.ones(3), torch.ones(4, 2), torch.ones(3)
    unchanged = matrix.detach().clone(), bias.detach().clone()
    optimizer.step()
    scheduler.step()
    assert torch.equal(matrix, unchanged[0])
    assert torch.equal(bias, unchanged[1])
    assert not torch.equal(piece, unchanged[0][0])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.0005, 0.15])


@pytest.mark.parametrize("make", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.AdamW])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_the_piece_is_trained_as_it_was_within_the_whole(make, steps_before, parameters):
    """State made before is cut, whether by the constructor (Adagrad) or by steps."""
    settings = {"momentum": 0.9} if make is torch.optim.SGD else {}
    if make is torch.optim.Adagrad:
        settings = {"initial_accumulator_value": 0.25}
    matrix = parameters[0]
    twin = nn.Parameter(matrix.detach().clone())
    optimizer, reference = make([matrix], lr=0.1, **settings), make([twin], lr=0.1, **settings)

    def step(chosen, chosen_optimizer, gradient):
        chosen.grad = gradient
        chosen_optimizer.step()

    for number in range(steps_before):
        step(matrix, optimizer, torch.full((2, 3), number + 1.0))
        step(twin, reference, torch.full((2, 3), number + 1.0))
    piece = nn.Parameter(first_row(matrix.detach()))
    swap_parameters(optimizer, {matrix: (piece, first_row)})
    assert matrix not in optimizer.state
    for number in range(3):
        gradient = torch.randn(2, 3, generator=torch.Generator().manual_seed(number))
        step(piece, optimizer, gradient[0].clone())
        step(twin, reference, gradient)
    assert torch.equal(piece, twin[0])


def test_the_state_of_a_dropped_parameter_is_given_up(parameters):
    optimizer = torch.optim.Adagrad(parameters)
    swap_parameters(optimizer, {parameters[0]: None})
    assert parameters[0] not in optimizer.state
    assert parameters[1] in optimizer.state
