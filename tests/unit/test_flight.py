"""The backward pass of one stage in two parts: gradients of inputs first, those of weights later."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import nn

from paceline.split.flight import Arrival, Arrive, Flight, backward, backward_of_inputs

CPU = torch.device("cpu")


class Writer(nn.Module):
    """A decoder: what it makes of its own tokens meets what comes from the encoder in several places."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(7, 8)
        self.layers = nn.ModuleList(
            nn.TransformerDecoderLayer(8, 2, 16, dropout=0.0, batch_first=True, norm_first=True)
            for _ in range(layers)
        )

    def forward(self, memory: torch.Tensor) -> torch.Tensor:
        x = self.tokens(torch.arange(10).view(2, 5) % 7)
        for layer in self.layers:
            x = layer(x, memory)
        return x


class Scaled(nn.Module):
    """One weight is used in several places, of which not all see the input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(8, 8))
        self.others = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        own = torch.tanh(self.weight @ self.weight)
        for other in self.others:
            x = other(x @ own) * torch.sigmoid(self.weight.sum(0)) + other(own)[0]
        return x


class Tied(nn.Module):
    """Two layers have a weight in common, and each one of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.common = (nn.Parameter(torch.randn(8, 8)) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x @ (self.first + self.common) @ (self.second + self.common)


class Recorder:
    """Links of a stage that receives no gradients."""

    def __init__(self):
        self.sent = []

    def send(self, tensor, source, target, kind):
        self.sent.append(tensor.clone())

    def receive(self, tensor, source, target, kind):
        raise AssertionError("the last stage receives no gradients")


def gradients(model: nn.Module, *, in_parts: bool) -> list[torch.Tensor]:
    """Of all weights, and of the stage's input."""
    arrival, links = Arrival(), Recorder()
    came = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
    value = Arrive.apply(torch.empty(0, requires_grad=True), came, arrival)
    if in_parts:
        arrival.value, value = value, value.clone()
    flight = Flight(received={0: [arrival]}, loss=model(value).square().sum())
    if in_parts:
        later = backward_of_inputs(flight, 1, links, CPU, list(model.parameters()))
        assert all(p.grad is None for p in model.parameters())
        assert later is not None
        later()
    else:
        backward(flight, 1, links, CPU)
    _, of_input = links.sent
    return [of_input, *(p.grad for p in model.parameters())]


@pytest.mark.parametrize("make", [functools.partial(Writer, 1), functools.partial(Writer, 3), Scaled, Tied])
def test_both_parts_together_are_the_whole(make):
    torch.manual_seed(0)
    model = make()
    for whole, parts in zip(
        gradients(copy.deepcopy(model), in_parts=False), gradients(model, in_parts=True), strict=True
    ):
        torch.testing.assert_close(parts, whole, rtol=1e-4, atol=1e-4)
