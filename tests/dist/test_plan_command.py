"""`paceline plan`: measured with real workers, forecast, printed, and kept as JSON."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from command import TOY, paceline
from typer.testing import CliRunner

from paceline.cli import app
from paceline.plan.forecast import Forecaster
from paceline.plan.goal import GoalCurve
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Layout


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    out = tmp_path_factory.mktemp("plan") / "run"
    return out, paceline(
        "plan", str(TOY), "--budget=2", "--number=3", "--noise-scale=50", "--price=2", f"--out={out}"
    )  # fmt: skip


def test_it_ranks_layouts_says_why_the_others_lost_and_shows_the_curve(planned):
    _, process = planned
    assert process.returncode == 0, process.stderr
    assert "layouts, by forecast" in process.stdout
    told = " ".join(process.stdout.split())
    reasons = r" ms are | takes as long as | by too little to tell| do not explain\.| takes [\d.e+]+ ms more than in "
    assert len(re.findall(reasons, told)) == 2
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
    assert all(layout["limited_by"] for layout in plan["layouts"])
    assert ["why_it_lost" in layout for layout in plan["layouts"]] == [False, True, True]
    assert plan["goal"].pop("noise_source") == ""
    goal = GoalCurve.from_json(plan["goal"])
    assert (goal.noise_scale, goal.batch_size, goal.price_per_worker_hour) == (50, 12, 2)
    assert [point.workers for point in goal.points] == [point["workers"] for point in plan["curve"]["points"]]
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
    assert "Time to a target" in page
    assert (out / "goal.png").stat().st_size > 10_000
    assert (out / "timeline.png").stat().st_size > 10_000


def here(*arguments: str) -> Any:
    """The same command in this process: what measures nothing needs no process of its own."""
    return CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "160", "NO_COLOR": "1"})


def test_what_was_kept_is_planned_with_again_for_a_described_cluster(planned, tmp_path):
    kept, _ = planned
    file = tmp_path / "cluster.toml"
    file.write_text(
        'name = "four GPUs"\nwithin = "nvlink3"\n[[hosts]]\nname = "g"\nworkers = 4\ndevice = "a100-40gb"\n'
    )
    out = tmp_path / "run"
    result = here(str(TOY), f"--profile={kept}", f"--cluster={file}", f"--out={out}")
    assert result.exit_code == 0, result.output
    assert "Estimated, not measured: four GPUs (1 host, 4 workers)." in result.output
    assert "from a datasheet, not measured (NVIDIA A100 (2021))" in " ".join(result.output.split())
    # Nothing was measured.
    assert not (out / "profile.json").exists()
    assert (out / "plan.html").exists()
    plan = json.loads((out / "plan.json").read_text())
    assert LinkedCluster.from_json(plan["cluster"]).cluster.workers == 4
    assert plan["described"]["name"] == "four GPUs"
    assert any("A100" in note for note in plan["notes"])


def test_what_was_kept_gives_the_plan_again(planned):
    kept, process = planned
    again = here(str(TOY), "--number=3", "--noise-scale=50", "--price=2", f"--profile={kept}")
    assert again.exit_code == 0, again.output
    assert process.stdout.startswith(again.output)


@pytest.mark.parametrize("option", ["--cluster", "--profile"])
def test_a_mistake_is_said_before_anything_is_measured(tmp_path, option):
    out = tmp_path / "run"
    result = here(str(TOY), f"--out={out}", f"{option}={tmp_path / 'none'}")
    assert result.exit_code == 1
    assert "none cannot be read: No such file" in result.output
    assert not out.exists()
