"""What is measured is kept, and taken only for what would be measured in the same way."""

from __future__ import annotations

from pathlib import Path

import torch
from command import TOY
from planning_examples import linked, profile

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.launch import measuring
from paceline.launch.measuring import Measuring
from paceline.launch.spec import RunSpec
from paceline.load import load_job_file
from paceline.plan.profile import LinkedCluster, Profile
from paceline.train.session import Datasets


def test_only_what_is_measured_in_the_same_way_is_taken_from_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PACELINE_CACHE", str(tmp_path))
    found: tuple[Profile, LinkedCluster] = profile(), linked()
    monkeypatch.setattr(measuring, "measure_all", lambda *_, **__: found)
    loaded = load_job_file(str(TOY), {})
    world = World(0, 1, 0, 1, torch.device("cpu"), 10.0)

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
