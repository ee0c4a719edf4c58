"""What a job computes, counted."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.plan.curves import Curve
from paceline.plan.profile import Block
from paceline.train.device_speeds import product_flops_per_s
from paceline.train.work import Work, with_work


def counted(module: nn.Module, *inputs: torch.Tensor) -> Work:
    with torch.no_grad(), Work() as work:
        module(*inputs)
    return work


class Attention(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.scaled_dot_product_attention(x, x, x)


def test_products_convolutions_attention_and_recurrences_are_counted():
    assert counted(nn.Linear(8, 16), torch.rand(4, 8)).flops == 2 * 4 * 8 * 16
    # 6 × 6 places, 3 × 3 × 2 numbers, 5 channels.
    assert counted(nn.Conv2d(2, 5, 3), torch.rand(1, 2, 8, 8)).flops == 2 * 36 * 18 * 5
    # Scores and their products with the values, of two heads.
    assert counted(Attention(), torch.rand(1, 2, 16, 8)).flops == 2 * (2 * 16 * 16 * 8 * 2)
    recurrent = 2 * 5 * 3 * (8 * 4 * 16 + 16 * 4 * 16)
    assert counted(nn.LSTM(8, 16), torch.rand(5, 3, 8)).flops == recurrent


def test_views_are_no_operations():
    with Work() as work:
        x = torch.ones(2, 3)
        x.t().reshape(-1).view(6)
        x.t()
    # ones is one call; the reshape of a transpose copies.
    assert work.operations == 2


def test_blocks_get_the_mean_of_their_calls():
    curve = Curve.line(0.0, 1.0)
    blocks = [Block(name=name, forward_s=curve, backward_s=curve) for name in "ab"]
    found = with_work(blocks, (0, 1, 0), [(40, 3), (8, 1), (80, 5)], 4)
    assert [(b.flops, b.operations) for b in found] == [(15.0, 4), (2.0, 1)]


def test_a_product_is_timed_by_all_that_take_part():
    calls = []

    def go_on(wish: bool) -> bool:
        calls.append(wish)
        return True

    found = product_flops_per_s(torch.device("cpu"), go_on)
    assert 1e8 < found < 1e14
    assert len(calls) == 12


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_recurrence_on_a_gpu():
    found = counted(nn.LSTM(8, 16).cuda(), torch.rand(5, 3, 8, device="cuda"))
    assert found.flops == 2 * 5 * 3 * (8 * 4 * 16 + 16 * 4 * 16)
