"""What is believed of layouts that are tried: more than one moment of each."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import paceline
from paceline.comm.world import join
from paceline.launch import failure
from paceline.records import Layout, Trial
from paceline.train import trying
from paceline.train.session import Datasets
from paceline.train.trial import LayoutTimer, time_by_turns
from paceline.train.trying import groups_again, tried, try_layouts

FIRST_S, LATER_S = 0.03, 0.004
ALONE, TWO, THREE = Layout(threads=1), Layout(dp_replicate=2, threads=1), Layout(dp_shard=2, threads=1)
NUMBER = itertools.count()


class Disturbed(nn.Module):
    """The first that is built is slow, as where something else runs on the machine for a moment."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 2)
        self.takes_s = LATER_S if next(NUMBER) else FIRST_S

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(self.takes_s)
        return self.linear(x)


def a_job() -> paceline.Job:
    data = TensorDataset(torch.zeros(64, 4), torch.zeros(64, dtype=torch.int64))
    return paceline.Job(
        model=Disturbed,
        data=lambda split: data,
        loss=lambda outputs, batch: F.cross_entropy(outputs, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, 0.1),
        batch_size=64,
    )


def a_trial(layout: Layout, *step_s: float, **more) -> Trial:
    median = sorted(step_s)[len(step_s) // 2] if step_s else None
    return Trial(
        layout=layout,
        label="",
        workers=layout.workers,
        threads=1,
        step_s=step_s,
        median_step_s=median,
        **more,
    )


def test_what_one_visit_finds_by_chance_two_others_correct():
    world = join("cpu", 60.0)
    job = a_job()
    (visits,) = try_layouts(
        [[ALONE]],
        job,
        world,
        world.group(1),
        Datasets(job, 0),
        budget_s=0.1,
        pauses=False,
        seed=0,
        precision="fp32",
    )
    assert len(visits) == 3
    assert visits[0].median_step_s >= FIRST_S
    found = tried(visits, 1000, pauses=False)
    assert LATER_S <= found.step_s < FIRST_S
    # The first tells what is held.
    assert visits[1].grown_bytes is None
    assert visits[2].grown_bytes is None
    assert found.peak_bytes == (None if (grown := visits[0].grown_bytes) is None else 1000 + grown)


def timed_alone(job: paceline.Job, **how: Any) -> list[Trial]:
    world = join("cpu", 60.0)
    return time_by_turns(
        [[ALONE]], job, world, world.group(1), Datasets(job, 0), seed=0, precision="fp32", **how
    )


def test_no_group_is_begun_when_time_is_up():
    assert timed_alone(a_job(), until_s=time.monotonic() - 1) == []


def a_slow_job(steps: list[None]) -> paceline.Job:
    """Each step takes `FIRST_S`, and is noted."""

    class Slow(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            steps.append(time.sleep(FIRST_S))
            return self.linear(x)

    return dataclasses.replace(a_job(), model=Slow)


def test_one_step_of_a_slow_layout_is_a_round_from_the_first_after_the_warm_up():
    steps: list[None] = []
    (trial,) = timed_alone(a_slow_job(steps), budget_s=FIRST_S, rounds=(3, 3))
    assert len(trial.step_s) == 3
    assert len(steps) == 2 + 3
    assert min(trial.step_s) >= FIRST_S


def test_a_round_has_as_many_steps_as_are_asked_for():
    steps: list[None] = []
    world, job = join("cpu", 60.0), a_slow_job(steps)
    how: dict[str, Any] = {"seed": 0, "precision": "fp32", "budget_s": FIRST_S, "rounds": (2, 2)}
    (trial,) = LayoutTimer(job, [ALONE], world, Datasets(job, 0), fewest_steps=3, **how).run()
    assert len(trial.step_s) == 2
    # Two warm up, and one tells how long they take.
    assert len(steps) == 2 + 1 + 2 * 3


def test_the_fastest_are_visited_again_first(monkeypatch):
    takes_s, visited = {ALONE: 2.0, TWO: 3.0, THREE: 1.0}, []

    def time_some(groups, *_: object, **how: object) -> list[Trial]:
        visited.append([list(group) for group in groups])
        return [a_trial(layout, takes_s[layout]) for group in groups for layout in group]

    monkeypatch.setattr(trying, "time_by_turns", time_some)
    everyone = SimpleNamespace(gather_json=lambda value, what: [value])
    try_layouts([[ALONE], [TWO, THREE]], None, None, everyone, None, budget_s=1.0, pauses=False)
    assert visited == [[[ALONE], [TWO, THREE]], [[TWO, THREE], [ALONE]], []]


def test_an_error_tells_which_layout_was_tried(tmp_path):
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("no such kernel")

    world = join("cpu", 60.0)
    job = dataclasses.replace(a_job(), model=Broken)
    with pytest.raises(RuntimeError, match="no such kernel") as caught:
        time_by_turns(
            [[ALONE]], job, world, world.group(1), Datasets(job, 0), seed=0, precision="fp32", budget_s=0.1
        )
    told = failure.record(tmp_path, 0, caught.value)
    assert "no such kernel" in told.what
    assert f"while {ALONE} was tried" in told.what
    assert "--layout" in told.what


def test_only_layouts_that_differ_are_visited_again():
    found = {
        ALONE: [a_trial(ALONE, 1.0), a_trial(ALONE, 1.05)],
        TWO: [a_trial(TWO, 1.0), a_trial(TWO, 1.2)],
        THREE: [a_trial(THREE, error="it does not fit")],
    }
    assert groups_again([[ALONE, TWO], [THREE]], found, pauses=False) == [[TWO]]


def test_of_many_that_differ_those_that_differ_most_are_visited_again():
    layouts = [Layout(dp_replicate=n, threads=1) for n in range(1, 21)]
    found = {x: [a_trial(x, 1.0), a_trial(x, 1.1 + x.workers / 100)] for x in layouts}
    again = [x for group in groups_again([layouts[:10], layouts[10:]], found, pauses=False) for x in group]
    assert again == layouts[-len(again) :]
    assert 0 < len(again) < 10


@pytest.mark.parametrize(("steps_s", "wanted_s"), [((1.0,), 1.0), ((1.0, 2.0), 1.5), ((1.0, 9.0, 2.0), 2.0)])
def test_what_the_visits_to_a_layout_tell(steps_s, wanted_s):
    found = tried([a_trial(ALONE, step_s) for step_s in steps_s], 0, pauses=False)
    assert math.isclose(found.step_s, wanted_s)


def test_where_workers_pause_whole_rounds_count():
    trial = a_trial(ALONE, 1.0, 3.0, 5.0).model_copy(update={"median_step_s": 0.5})
    assert tried([trial], 0, pauses=True).step_s == 3.0
    assert tried([trial], 0, pauses=False).step_s == 0.5


def test_what_could_not_be_timed_tells_nothing():
    assert tried([a_trial(ALONE, error="no")], 0, pauses=False) is None
