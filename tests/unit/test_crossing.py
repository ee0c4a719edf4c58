"""What would cross a cut after each piece: against what the first of two pipeline stages really sends."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from paceline.split.absent import AbsentCalls, AbsentPieces
from paceline.split.crossing import Crossing
from paceline.split.pieces import find_pieces
from paceline.split.pipeline import PipelineStage
from paceline.split.stages import PieceCalls, Stages

CPU = torch.device("cpu")
SAMPLES, WIDTH = 3, 8
FLOAT = SAMPLES * 4
"""Bytes of one number of each sample."""


class Rows(nn.Module):
    """Three pieces over rows [b, 5, 8]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(3))


class Pooled(Rows):
    def forward(self, x):
        x = self.layers[1](F.relu(self.layers[0](x))).mean(1)
        return self.layers[2](x)


class Skipping(Rows):
    """The first result is needed again at the end."""

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first) + first) + first


class Masked(Rows):
    """What comes from the batch alone is nowhere sent."""

    def forward(self, x):
        mask = x > 0
        x = self.layers[0](x) * mask
        x = self.layers[1](x) * mask
        return self.layers[2](x) * mask


class InPlace(Rows):
    def forward(self, x):
        y = self.layers[0](x)
        y += self.layers[1](y)
        return self.layers[2](y[:, :2])


class Joined(Rows):
    """Results of pieces that do not follow each other are joined later."""

    def forward(self, x):
        joined = torch.cat([layer(x) for layer in self.layers[:2]], 1)
        return self.layers[2](joined.flatten(0, 1))


class TwoResults(Rows):
    """The last stage gets all that the model returns."""

    def forward(self, x):
        first = self.layers[0](x)
        return self.layers[2](self.layers[1](first)), first.sum(-1)


class Positions(Rows):
    """A parameter that is read between the pieces."""

    def __init__(self):
        super().__init__()
        self.places = nn.Parameter(torch.randn(5, WIDTH))

    def forward(self, x):
        x = self.layers[0](x) + self.places[:5]
        return self.layers[2](self.layers[1](x))


class Recorder:
    """Links of the first stage, which receives nothing in a forward pass."""

    def __init__(self):
        self.sent = 0

    def send(self, tensor, source, target, kind):
        assert (source, target, kind) == (0, 1, "F")
        self.sent += tensor.nbytes

    def receive(self, tensor, source, target, kind):
        raise AssertionError("nothing comes to the first stage")


def crossing(model: nn.Module, x: torch.Tensor) -> list[float]:
    calls = PieceCalls(model, find_pieces(model))
    found = Crossing(lambda: calls.is_inside)
    calls.on_call = lambda piece, forward, args, kwargs: found.called(
        (args, kwargs), forward(*args, **kwargs)
    )
    with found:
        found.returned(model(x))
    return found.bytes_after()


def sent(model: nn.Module, x: torch.Tensor, after: int) -> int:
    """Bytes that the first stage sends where the model is cut after call `after`."""
    pieces = find_pieces(model)
    calls = PieceCalls(model, pieces)
    names = {id(p): name for name, p in model.named_parameters()}
    where = {(piece.name, 0): int(at > after) for at, piece in enumerate(pieces)}
    stages = Stages(2, where, dict.fromkeys(names.values(), (0, 1)))
    links = Recorder()
    stage = PipelineStage(
        0,
        stages,
        calls,
        links,
        AbsentPieces(CPU),
        AbsentCalls(CPU),
        names,
        CPU,
        lambda piece, forward, args, kwargs: forward(*args, **kwargs),
        in_parts=False,
    )
    with stage.running():
        outputs = model(x)
    stage.collect(outputs)
    return links.sent


@pytest.mark.parametrize(
    ("kind", "wanted"),
    [
        (Pooled, [5 * WIDTH, WIDTH]),
        (Skipping, [5 * WIDTH, 10 * WIDTH]),
        (Masked, [5 * WIDTH, 5 * WIDTH]),
        (InPlace, [5 * WIDTH, 2 * WIDTH]),
        (Joined, [5 * WIDTH, 10 * WIDTH]),
        (TwoResults, [5 * WIDTH + 5, 5 * WIDTH + 5]),
        (Positions, [5 * WIDTH, 5 * WIDTH]),
    ],
)
def test_what_crosses_is_what_is_sent(kind, wanted):
    torch.manual_seed(0)
    x = torch.randn(SAMPLES, 5, WIDTH)
    found = crossing(kind(), x)
    assert found == [FLOAT * number for number in (*wanted, 0)]
    for after, number in enumerate(found[:-1]):
        assert sent(kind(), x, after) == number
