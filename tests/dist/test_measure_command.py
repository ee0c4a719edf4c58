"""`paceline measure`: with real workers, of the machine alone and of a job, which is then planned and trained."""

from __future__ import annotations

import json

import pytest
from command import TOY, of_kind, paceline, read_events
from typer.testing import CliRunner

from paceline.cli import app
from paceline.plan.hardware import Hardware
from paceline.plan.links import KINDS
from paceline.plan.profile import Profile


def test_the_machine_alone(tmp_path, default_transport):
    out = tmp_path / "machine"
    process = paceline("measure", "--budget=0.5", f"--out={out}")
    assert process.returncode == 0, process.stderr
    assert process.stderr == ""
    found = Hardware.from_json(json.loads((out / "hardware.json").read_text()))
    host = found.cluster.hosts[0]
    assert [speed.active for speed in found.devices[0]][-1] == host.workers
    assert all(speed.product_flops_per_s > 1e8 for speed in found.devices[0])
    assert f"{host.name}: " in process.stdout
    if host.workers == 1:
        return
    pairs = [exchanges for exchanges in found.exchanges if exchanges.workers == 2]
    assert [pair.transport for pair in pairs] == list(dict.fromkeys([default_transport, "gloo"]))
    for pair in pairs:
        assert tuple(one.kind for one in pair.measured) == KINDS == tuple(pair.fits)
        for one in pair.measured:
            assert one.seconds.points[0][0] in (4, 8)
            assert len(one.seconds.points) > 6
        # What is exchanged and computed at once takes no less than the longer of the two, but for noise.
        for overlap in pair.overlaps:
            assert overlap.both_s > 0.3 * max(overlap.computing_s, overlap.exchanging_s)
        assert f"2 workers, {pair.transport}" in process.stdout


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    out = tmp_path_factory.mktemp("measured") / "job"
    return out, paceline("measure", str(TOY), "--budget=2", f"--out={out}")


def test_a_job_is_measured_kept_and_printed(measured, tmp_path):
    out, process = measured
    assert process.returncode == 0, process.stderr
    profile = Profile.from_json(json.loads((out / "profile.json").read_text()))
    assert "Forward / backward pass of a block, ms: 1 worker × 1 thread" in process.stdout
    for block in profile.costs[0].blocks:
        assert f"\n{block.name} " in process.stdout
    is_kept = not profile.how_noisy
    assert ("Kept for a week" in process.stdout) == is_kept
    trained = paceline("train", str(TOY), "--steps=2", "--no-verify", f"--out={tmp_path / 'run'}")
    assert trained.returncode == 0, trained.stderr
    for event in of_kind(read_events(tmp_path / "run"), "forecasts"):
        assert event["source"] == ("kept" if is_kept else "measured")
    if is_kept:
        planned = paceline("plan", str(TOY), "--number=2")
        assert planned.returncode == 0, planned.stderr
        assert "kept: --remeasure measures the job again" in " ".join(planned.stdout.split())


def test_what_it_left_is_planned_with(measured):
    out, _ = measured
    result = CliRunner().invoke(app, ["plan", str(TOY), f"--profile={out}"], env={"NO_COLOR": "1"})
    assert result.exit_code == 0, result.output
    assert "layouts, by forecast" in result.output


def test_a_mistake_is_said_plainly():
    result = CliRunner().invoke(app, ["measure", "--transport=pigeon"])
    assert result.exit_code == 1
    assert "--transport is 'pigeon'" in result.output
