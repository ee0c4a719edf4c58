"""The gradient noise scale: its estimate against a known truth, its average, and what measuring it costs."""

from __future__ import annotations

import itertools
import json
import math
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import TensorDataset

import paceline
from paceline.errors import LossError
from paceline.events import EventWriter
from paceline.plan.noise import Measurement, Smoothing
from paceline.report.reader import read_log
from paceline.train import noise
from paceline.train.loop import TrainingLoop
from paceline.train.noise import norms
from paceline.train.session import Session
from paceline.train.target import Length

WIDTH = 20
MEAN = np.linspace(-0.2, 0.3, WIDTH)
DEVIATION = np.linspace(0.5, 1.5, WIDTH)
SQUARED, TRACE = float((MEAN**2).sum()), float((DEVIATION**2).sum())


@pytest.fixture(autouse=True)
def every_second_step(monkeypatch):
    monkeypatch.setattr(noise, "SHARE", 1e9)


def gaussian_job(*, weighted: bool = False, length: int = 9_600, batch_size: int = 24) -> paceline.Job:
    """A linear model whose gradient for a sample is that sample: drawn from a known normal distribution."""
    generator = torch.Generator().manual_seed(3)
    x = torch.from_numpy(MEAN) + torch.from_numpy(DEVIATION) * torch.randn(
        length, WIDTH, generator=generator, dtype=torch.float64
    )
    weights = torch.randint(1, 6, (length,), generator=generator).double()

    def loss(outputs: torch.Tensor, batch: list[torch.Tensor]) -> object:
        return ((outputs[:, 0] * batch[1]).sum(), batch[1].sum()) if weighted else outputs.mean()

    return paceline.Job(
        model=lambda: nn.Linear(WIDTH, 1, bias=False),
        data=lambda split: TensorDataset(x.float(), weights.float()),
        loss=loss,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.0),
        batch_size=batch_size,
    )


def measured(job: paceline.Job, layout: str, steps: int) -> list[noise.StepNoise]:
    with Session(job, layout, seed=1) as session:
        results = [session.step(batch) for batch in session.batches(steps=steps)]
    return [result.noise for result in results if result.noise is not None]


def test_the_estimate_has_the_known_mean():
    found = measured(gaussian_job(), "micro=8,threads=1", 300)
    assert len(found) == 150 - 1
    assert np.mean([f.measured.trace for f in found]) == pytest.approx(TRACE, rel=0.03)
    assert np.mean([f.measured.squared_gradient for f in found]) == pytest.approx(SQUARED, rel=0.2)
    last = found[-1].scale
    assert last.low < TRACE / SQUARED < last.high
    assert last.high < 2 * last.low


def test_weights_count():
    """A weighted mean over samples has the noise of samples with the covariance Σ E w² / (E w)²."""
    found = measured(gaussian_job(weighted=True, batch_size=192), "micro=4,threads=1", 300)
    trace = TRACE * np.mean(np.arange(1, 6) ** 2) / 9
    assert np.mean([f.measured.trace for f in found]) == pytest.approx(trace, rel=0.04)
    assert np.mean([f.measured.squared_gradient for f in found]) == pytest.approx(SQUARED, rel=0.1)


@settings(max_examples=12, deadline=None)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=5), st.integers(0, 1000))
def test_unequal_parts_have_no_bias(sizes, seed):
    random, total, trials = np.random.default_rng(seed), sum(sizes), 1500
    parts = [MEAN + DEVIATION * random.normal(size=(trials, WIDTH)) / math.sqrt(b) for b in sizes]
    whole = sum(b * part for b, part in zip(sizes, parts, strict=True)) / total
    of_parts = sum(b * (part**2).sum(1) for b, part in zip(sizes, parts, strict=True)) / total
    found = [
        Measurement.of(1, total, len(sizes), *pair) for pair in zip(of_parts, (whole**2).sum(1), strict=True)
    ]
    for values, truth in (([f.trace for f in found], TRACE), ([f.squared_gradient for f in found], SQUARED)):
        assert abs(np.mean(values) - truth) < 5 * np.std(values) / math.sqrt(trials)


def test_equal_parts_give_the_formulas_of_the_paper():
    found = Measurement.of(1, 32, 4, 5.0, 2.0)
    small, big = 8, 32
    assert found.squared_gradient == pytest.approx((big * 2.0 - small * 5.0) / (big - small))
    assert found.trace == pytest.approx((5.0 - 2.0) / (1 / small - 1 / big))


def draw(random: np.random.Generator, squared: float, trace: float, spread: float) -> Measurement:
    return Measurement(
        step=1,
        samples=32,
        parts=2,
        squared_gradient=squared + spread * random.normal(),
        trace=trace + spread * random.normal(),
    )


def test_the_interval_holds_the_truth_19_times_in_20():
    held = 0
    for seed in range(300):
        random, smoothing = np.random.default_rng(seed), Smoothing()
        for _ in range(100):
            smoothing.add(draw(random, 1.0, 40.0, 1.0))
        scale = smoothing.scale()
        assert scale.low < scale.samples < scale.high
        held += scale.low < 40.0 < scale.high
    assert 0.9 < held / 300 < 0.99


def test_a_gradient_that_is_lost_in_the_noise_gives_no_scale():
    random, smoothing = np.random.default_rng(0), Smoothing()
    for _ in range(100):
        smoothing.add(draw(random, 0.0, 40.0, 2.0))
    assert smoothing.scale().samples is None
    assert smoothing.scale().measurements == 100


def test_few_measurements_give_no_scale():
    random, smoothing = np.random.default_rng(0), Smoothing()
    for number in range(12):
        assert (smoothing.scale().samples is None) == (number < 10)
        smoothing.add(draw(random, 1.0, 40.0, 0.1))
    assert smoothing.scale().samples == pytest.approx(40.0, rel=0.1)


def test_the_first_half_is_forgotten():
    random, smoothing = np.random.default_rng(0), Smoothing()
    for number in range(200):
        smoothing.add(draw(random, *((1e6, 10.0) if number < 100 else (1.0, 40.0)), 0.1))
    assert smoothing.scale().samples == pytest.approx(40.0, rel=0.05)
    assert smoothing.scale().high < 42.0


@pytest.mark.parametrize("shape", [(7,), (3, 5), (1 << 15,), (3, 70_001), (64, 1 << 15)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_rows_add_up(shape, dtype):
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = norms(tensor)
    assert found.ndim == 1
    assert found.dtype == torch.float32
    assert float(found.double().square().sum()) == pytest.approx(
        float(tensor.double().square().sum()), rel=1e-5
    )


class Twice(nn.Module):
    """One layer, called twice; in checkpoints of the old kind each call brings a gradient of its own."""

    def __init__(self, *, reentrant: bool) -> None:
        super().__init__()
        self.first, self.layer, self.last = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 2)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        for _ in range(2):
            h = torch.tanh(checkpoint(self.layer, h, use_reentrant=True) if self.reentrant else self.layer(h))
        return self.last(h)


def test_gradients_that_come_in_pieces_are_added_up():
    def job(*, reentrant: bool) -> paceline.Job:
        generator = torch.Generator().manual_seed(1)
        data = TensorDataset(torch.randn(400, 8, generator=generator), torch.arange(400) % 2)
        return paceline.Job(
            model=lambda: Twice(reentrant=reentrant),
            data=lambda split: data,
            loss=lambda outputs, batch: nn.functional.cross_entropy(outputs, batch[1]),
            optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
            batch_size=8,
        )

    plain = [f.measured for f in measured(job(reentrant=False), "micro=2", 8)]
    pieces = [f.measured for f in measured(job(reentrant=True), "micro=2", 8)]
    assert [m.step for m in plain] == [2, 4, 6]
    assert [m.step for m in pieces] == [4, 6]  # the first, in which that was found out, is lost
    for own, other in zip(pieces, plain[1:], strict=True):
        assert own.trace == pytest.approx(other.trace, rel=1e-4)
        assert own.squared_gradient == pytest.approx(other.squared_gradient, rel=1e-4)


def test_events_tell_each_measurement_and_the_average_so_far(tmp_path):
    with Session(gaussian_job(), "micro=4,threads=1", seed=1) as session:
        writer = EventWriter(tmp_path / "events.jsonl")
        TrainingLoop(session, Length(steps=41, epochs=None), None, writer).run()
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["event"] == "noise"]
    assert [(e["step"], e["samples"], e["parts"]) for e in told] == [
        (step, 24, 4) for step in range(2, 41, 2)
    ]
    smoothing = Smoothing()
    for event in told:
        smoothing.add(Measurement(**{name: event[name] for name in Measurement.model_fields}))
    last = read_log(tmp_path / "events.jsonl").noise
    assert (last.noise_scale, last.low, last.high) == pytest.approx(
        (smoothing.scale().samples, smoothing.scale().low, smoothing.scale().high)
    )
    assert last.measurements == 20
    assert last.every == 2
    assert last.cost_s > 0


def test_one_piece_of_a_batch_is_not_measured_and_uneven_batches_are_not():
    assert measured(gaussian_job(), "dp_replicate=1", 20) == []
    found = measured(gaussian_job(length=40), "micro=2", 20)  # every second batch has 16 samples
    assert {f.measured.samples for f in found} == {24}
    assert {f.measured.step % 2 for f in found} == {1}


def test_steps_are_measured_so_seldom_that_it_takes_less_than_one_hundredth_of_the_time(monkeypatch):
    monkeypatch.undo()
    now_s, ticks = 0.0, itertools.count()

    def perf_counter() -> float:
        """Every look at the clock takes 50 µs, at first much longer."""
        nonlocal now_s
        now_s += 5e-3 if next(ticks) < 7 else 5e-5
        return now_s

    monkeypatch.setattr(noise, "time", types.SimpleNamespace(perf_counter=perf_counter))
    job = gaussian_job()

    def loss(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        nonlocal now_s
        now_s += 5e-3
        return outputs.mean()

    object.__setattr__(job, "loss", loss)
    found = measured(job, "micro=2,threads=1", 400)
    assert len(found) > 5
    assert found[0].cost_s > 5e-3
    assert found[0].every == 2  # what it cost says little about the others
    assert sum(f.cost_s for f in found[1:]) < 0.01 * now_s


def test_a_step_that_fails_while_it_is_measured_leaves_nothing_behind():
    job, fails = gaussian_job(), [False]

    def loss(outputs: torch.Tensor, batch: object) -> torch.Tensor:
        return outputs.mean() * (math.nan if fails[0] else 1.0)

    object.__setattr__(job, "loss", loss)
    with Session(job, "micro=2", seed=1) as session:
        found = []
        for number, batch in enumerate(session.batches(steps=8)):
            fails[0] = number == 1  # the first that is measured
            if fails[0]:
                with pytest.raises(LossError):
                    session.step(batch)
                session.optimizer.zero_grad()
            else:
                found.append(session.step(batch).noise)
    assert [f.measured.step for f in found if f is not None] == [2, 4, 6]
    assert all(not parameter._backward_hooks for parameter in session.model.parameters())
