"""`paceline plan`: measured with real workers, forecast, printed, and kept as JSON."""

from __future__ import annotations

import json

import pytest
from command import TOY, paceline

from paceline.plan.forecast import Forecaster
from paceline.plan.goal import GoalCurve
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Layout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "run"
    return out, paceline(
        "plan", str(TOY), "--number=3", "--noise-scale=50", "--price=2", f"--out={out}"
    )  # fmt: skip


def test_it_ranks_layouts_says_why_the_others_lost_and_shows_the_curve(planned):
    _, process = planned
    assert process.returncode == 0, process.stderr
    assert "layouts, by forecast" in process.stdout
    assert process.stdout.count(" ms are ") + process.stdout.count(" takes as long as ") == 2
    assert "speed-up" in process.stdout
    assert "← knee" in process.stdout
    assert "With a gradient noise scale of 50 samples" in process.stdout
    assert "Least time" in process.stdout
    assert process.stderr == ""


def test_what_was_measured_is_kept_and_gives_the_same_forecasts(planned, default_transport):
    out, _ = planned
    profile = Profile.from_json(json.loads((out / "profile.json").read_text()))
    linked = LinkedCluster.from_json(json.loads((out / "cluster.json").read_text()))
    plan = json.loads((out / "plan.json").read_text())
    assert profile.batch_size == 12
    workers = linked.cluster.workers
    if workers > 1:
        assert linked.within.name == default_transport
        assert {(costs.active > 1) for costs in profile.costs} == {False, True}
        assert {found.workers for found in linked.within.measured} == {workers}
    assert len(plan["layouts"]) == 3
    goal = GoalCurve.from_json(plan["goal"])
    assert (goal.noise_scale, goal.batch_size, goal.price_per_worker_hour) == (50, 12, 2)
    assert [point.workers for point in goal.points] == [point["workers"] for point in plan["curve"]["points"]]
    steps_s = [sum(layout["terms"].values()) for layout in plan["layouts"]]
    assert steps_s == sorted(steps_s)
    again = Forecaster(profile, linked).forecast(Layout.from_json(plan["layouts"][0]["layout"]))
    assert again.step_s == pytest.approx(steps_s[0])
