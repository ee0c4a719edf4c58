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
FOUR = Layout(dp_replicate=4, threads=1)
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


def visits_alone(monkeypatch, **more: Any) -> list[Trial]:
    monkeypatch.setitem(globals(), "NUMBER", itertools.count())
    world, job = join("cpu", 60.0), a_job()
    how: dict[str, Any] = {"budget_s": 0.1, "pauses": False, "seed": 0, "precision": "fp32", **more}
    (visits,) = try_layouts([[ALONE]], job, world, world.group(1), Datasets(job, 0), **how)
    return visits


def test_what_the_first_visit_finds_by_chance_later_turns_correct(monkeypatch):
    visits = visits_alone(monkeypatch)
    assert visits[0].median_step_s >= FIRST_S
    found = tried(visits, 1000, pauses=False)
    assert LATER_S <= found.step_s < FIRST_S
    # The first tells what is held.
    assert all(one.grown_bytes is None for one in visits[1:])
    assert found.peak_bytes == (None if (grown := visits[0].grown_bytes) is None else 1000 + grown)


def test_where_nobody_knows_what_is_held_each_is_visited_by_itself(monkeypatch):
    monkeypatch.setattr(trying, "available_memory_bytes", lambda device: 0)
    visits = visits_alone(monkeypatch)
    # The second is far from the first.
    assert len(visits) == 3
    assert tried(visits, 1000, pauses=False).step_s < FIRST_S


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


def test_the_first_step_of_a_long_round_does_not_count_among_the_steps():
    """It finds the caches as the layout before it has left them."""
    # Two steps warm up, and one tells how long they take.
    takes_s = iter([LATER_S, LATER_S, LATER_S, 10 * FIRST_S, LATER_S, 3 * FIRST_S])

    class Cold(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            time.sleep(next(takes_s))
            return self.linear(x)

    world, job = join("cpu", 60.0), dataclasses.replace(a_job(), model=Cold)
    how: dict[str, Any] = {"seed": 0, "precision": "fp32", "budget_s": LATER_S, "rounds": (1, 1)}
    (trial,) = LayoutTimer(job, [ALONE], world, Datasets(job, 0), fewest_steps=3, **how).run()
    # The median of all three would be the third.
    assert LATER_S < trial.median_step_s < 2.5 * FIRST_S
    assert trial.step_s[0] > 4 * FIRST_S


def test_nothing_takes_turns_where_nobody_knows_what_is_free():
    found = {ALONE: [a_trial(ALONE, 1.0, grown_bytes=0)]}
    assert list(trying.taking_turns([[ALONE]], found, 0.0, pauses=False)) == []
    assert list(trying.taking_turns([[ALONE]], found, 1.0, pauses=False)) == [[ALONE]]


def visited(
    monkeypatch, takes_s: dict[Layout, float], holds: dict[Layout, int | None]
) -> list[list[list[Layout]]]:
    """Groups of each visit, where there are 1000 bytes."""
    told = []

    def time_some(groups, *_: object, **how: object) -> list[Trial]:
        told.append([list(group) for group in groups])
        every = [layout for group in groups for layout in group]
        return [a_trial(layout, takes_s[layout], grown_bytes=holds[layout]) for layout in every]

    monkeypatch.setattr(trying, "time_by_turns", time_some)
    monkeypatch.setattr(trying, "available_memory_bytes", lambda device: 1000 / trying._SHARE_OF_ROOM)
    everyone: Any = SimpleNamespace(gather_json=lambda value, what: [value])
    world: Any = SimpleNamespace(device=torch.device("cpu"), local_size=1)
    some: Any = None
    try_layouts([[ALONE], [TWO, THREE], [FOUR]], some, world, everyone, some, budget_s=1.0, pauses=False)
    return told


def test_fast_layouts_take_turns_and_slow_ones_are_visited_alone(monkeypatch):
    takes_s = {ALONE: 2.0, TWO: 3.0, THREE: 1.0, FOUR: 100.0}
    first, turns, slow, apart = visited(monkeypatch, takes_s, dict.fromkeys(takes_s, 400))
    assert first == [[ALONE], [TWO, THREE], [FOUR]]
    # One model serves two of them; the fastest first.
    assert turns == [[TWO, THREE, ALONE]]
    assert slow == [[FOUR]]
    assert apart == []


def test_as_many_take_turns_as_there_is_memory_for(monkeypatch):
    takes_s = dict.fromkeys((ALONE, TWO, THREE, FOUR), 1.0)
    holds = {ALONE: 400, TWO: 500, THREE: None, FOUR: 700}
    assert visited(monkeypatch, takes_s, holds)[1:3] == [[[ALONE, TWO, THREE], [FOUR]], []]
    holds = {ALONE: None, TWO: 500, THREE: None, FOUR: 1100}
    assert visited(monkeypatch, takes_s, holds)[1:3] == [[[TWO, THREE]], [[ALONE], [FOUR]]]


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


@pytest.mark.parametrize(("steps_s", "wanted_s"), [((1.0,), 1.0), ((1.0, 2.0), 2.0), ((1.0, 9.0, 2.0), 5.5)])
def test_what_the_visits_to_a_layout_tell(steps_s, wanted_s):
    found = tried([a_trial(ALONE, step_s) for step_s in steps_s], 0, pauses=False)
    assert math.isclose(found.step_s, wanted_s)


def test_where_workers_pause_whole_rounds_count():
    trial = a_trial(ALONE, 1.0, 3.0, 5.0).model_copy(update={"median_step_s": 0.5})
    assert tried([trial], 0, pauses=True).step_s == 3.0
    assert tried([trial], 0, pauses=False).step_s == 0.5


def test_what_could_not_be_timed_tells_nothing():
    assert tried([a_trial(ALONE, error="no")], 0, pauses=False) is None
