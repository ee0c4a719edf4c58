"""`paceline plan`: measured with real workers, forecast, printed, and kept as JSON."""

from __future__ import annotations

import json

import pytest
from command import TOY, paceline

from paceline.plan.forecast import Forecaster
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Layout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "run"
    return out, paceline("plan", str(TOY), "--number=3", f"--out={out}")


def test_it_ranks_layouts_says_why_the_others_lost_and_shows_the_curve(planned):
    _, process = planned
    assert process.returncode == 0, process.stderr
    assert "layouts, by forecast" in process.stdout
    assert process.stdout.count(" ms are ") + process.stdout.count(" takes as long as ") == 2
    assert "speed-up" in process.stdout
    assert "← knee" in process.stdout
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
    steps_s = [sum(layout["terms"].values()) for layout in plan["layouts"]]
    assert steps_s == sorted(steps_s)
    again = Forecaster(profile, linked).forecast(Layout.from_json(plan["layouts"][0]["layout"]))
    assert again.step_s == pytest.approx(steps_s[0])
    timeline = plan["timeline"]
    assert timeline["layout"] == plan["layouts"][0]["layout"]
    assert timeline["workers"][0]["spans"][-1]["end_s"] == timeline["step_s"] == pytest.approx(steps_s[0])


def test_pictures_and_a_page_are_written(planned):
    out, process = planned
    page = (out / "plan.html").read_text()
    assert str(out / "plan.html") in process.stdout
    (advice, *_) = json.loads((out / "plan.json").read_text())["advice"]["sentences"]
    assert advice.startswith("Train with ")
    assert advice.split(",")[0] in page
    assert f"<h1>{TOY.stem}</h1>" in page
    assert (out / "timeline.png").stat().st_size > 10_000
