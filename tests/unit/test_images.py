"""When batches of images are turned over, and that nothing else comes of it."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

import paceline
from paceline.train.images import ImageFormat, has_images

IMAGES = torch.randn(64, 3, 32, 32)


class Ticking:
    """A clock that a run moves on: more for batches as they come than for others."""

    def __init__(self, plain_s: float, turned_s: float) -> None:
        self.now_s, self.plain_s, self.turned_s, self.runs = 0.0, plain_s, turned_s, 0

    def __call__(self) -> float:
        return self.now_s

    def run(self, batch) -> float:
        self.runs += 1
        is_turned = batch[0].is_contiguous(memory_format=torch.channels_last)
        self.now_s += self.turned_s if is_turned else self.plain_s
        return 1.0


@pytest.mark.parametrize(("turned_s", "ratio"), [(0.7, 0.7), (0.95, None), (1.5, None)])
def test_it_is_taken_where_it_saves_a_tenth(turned_s, ratio):
    clock = Ticking(0.1, turned_s * 0.1)
    assert ImageFormat().measure([IMAGES, torch.arange(64)], clock.run, clock) == (
        ratio and pytest.approx(ratio)
    )


def test_long_passes_are_not_repeated():
    clock = Ticking(10.0, 5.0)
    assert ImageFormat().measure([IMAGES], clock.run, clock) == pytest.approx(0.5)
    assert clock.runs == 2


def test_another_loss_or_an_error_is_no_gain():
    losses = itertools.cycle([1.0, 1.1])
    assert ImageFormat().measure([IMAGES], lambda batch: next(losses)) is None

    def run(batch):
        if batch[0].is_contiguous(memory_format=torch.channels_last):
            raise RuntimeError("view size is not compatible")
        return 1.0

    assert ImageFormat().measure([IMAGES], run) is None


@pytest.mark.parametrize("batch", [[torch.randn(64, 3072)], [IMAGES[:2]], [IMAGES.long()], {"x": "text"}])
def test_what_is_no_large_batch_of_images_is_not_tried(batch):
    assert not has_images(batch)
    assert ImageFormat().measure(batch, lambda _: pytest.fail("it was tried")) is None


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
        self.head = nn.Linear(8, 10)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))


@pytest.mark.parametrize("ratio", [None, 0.5])
def test_the_training_is_the_same(ratio, monkeypatch):
    job = paceline.Job(
        model=Network, data=lambda split: TensorDataset(IMAGES, torch.arange(64) % 10),
        loss=lambda o, b: nn.functional.cross_entropy(o, b[1]),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), batch_size=32, steps=3,
    )  # fmt: skip
    seen = []
    forward = Network.forward

    def see(self, x):
        seen.append(x.is_contiguous(memory_format=torch.channels_last))
        return forward(self, x)

    monkeypatch.setattr(Network, "forward", see)
    results = []
    for measured in (None, ratio):
        monkeypatch.setattr(ImageFormat, "measure", lambda self, batch, run, m=measured: (run(batch), m)[1])
        with paceline.Session(job) as session:
            losses = [session.step(batch).loss for batch in session.batches()]
            assert session.channels_last == measured
            results.append((losses, session.evaluate(), session.model.state_dict()))
    assert any(seen) == (ratio is not None)
    (losses, metrics, state), (other_losses, other_metrics, other_state) = results
    assert other_losses == pytest.approx(losses, rel=1e-5)
    assert other_metrics == pytest.approx(metrics, rel=1e-4)
    for key, wanted in state.items():
        torch.testing.assert_close(other_state[key], wanted, rtol=1e-4, atol=1e-5)


class Viewing(Network):
    """Cannot take channels last, and finds that out after its batch norm has counted the batch."""

    def forward(self, x):
        return self.head(self.body(x).view(len(x), -1)[:, :8])


def test_a_pass_that_fails_leaves_no_statistics_behind():
    job = paceline.Job(
        model=Viewing, data=lambda split: TensorDataset(IMAGES, torch.arange(64) % 10),
        loss=lambda o, b: nn.functional.cross_entropy(o, b[1]),
        optimizer=lambda p: torch.optim.SGD(p, lr=0.1), batch_size=64, steps=1,
    )  # fmt: skip
    with paceline.Session(job) as session:
        for batch in session.batches():
            session.step(batch)
        assert session.channels_last is None
        assert session.model.body[1].num_batches_tracked == 1
