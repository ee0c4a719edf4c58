"""What is measured is kept, and taken only for what would be measured in the same way."""

from __future__ import annotations

from pathlib import Path

import torch
from command import TOY
from planning_examples import linked, profile, sending

from paceline.comm.group import Group
from paceline.comm.world import Known, World
from paceline.launch import measuring
from paceline.launch.choosing import Choosing
from paceline.launch.measuring import Measuring
from paceline.launch.spec import RunSpec
from paceline.load import load_job_file
from paceline.plan.profile import LinkedCluster, Profile
from paceline.records import Layout
from paceline.train.session import Datasets

CPU = torch.device("cpu")


def test_a_pipeline_that_the_user_asks_for_is_cut_as_its_kept_forecast_has_it(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    over_a_slow_link = sending(profile((1.0, 1.0, 1.0, 1.0)), 1e6, 2e6, 1e4, 1e4), linked(2, 1)
    monkeypatch.setattr(measuring, "measure_all", lambda *_, **__: over_a_slow_link)
    loaded = load_job_file(str(TOY), {})
    world = World(0, 2, 0, 1, CPU, 10.0)
    spec = RunSpec(purpose="train", job_file=str(TOY), out="")
    about = (
        spec,
        loaded,
        world,
        Group.alone(CPU),
        over_a_slow_link[1].cluster,
        Datasets(loaded.job, 0),
        "fp32",
    )
    choosing = Choosing(*about, lambda *_, **__: None)
    choosing.cut_as_forecast()
    assert world.known == Known()
    Measuring(*about).measure()
    choosing.cut_as_forecast()
    assert world.known.cuts_of is not None
    assert world.known.cuts_of(Layout(pp=2, micro=4)) == (0, 3, 4)


def test_only_what_is_measured_in_the_same_way_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    found: tuple[Profile, LinkedCluster] = profile(), linked()
    monkeypatch.setattr(measuring, "measure_all", lambda *_, **__: found)
    loaded = load_job_file(str(TOY), {})
    world = World(0, 1, 0, 1, CPU, 10.0)

    def of(precision: str = "fp32") -> Measuring:
        spec = RunSpec(purpose="measure", job_file=str(TOY), out="")
        everyone = Group.alone(world.device)
        datasets = Datasets(loaded.job, 0)
        return Measuring(spec, loaded, world, everyone, found[1].cluster, datasets, precision)

    assert of().kept() is None
    of().measure()
    assert of().kept() == found
    assert of("bf16").kept() is None
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert of().kept() is None
    monkeypatch.delenv("OMP_NUM_THREADS")
    # On a busy machine nothing new is kept.
    (kept,) = Path(tmp_path / "profiles").iterdir()
    kept.unlink()
    found = found[0].model_copy(update={"spread": 0.5}), found[1]
    of().measure()
    assert of().kept() is None
