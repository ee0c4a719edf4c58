"""What is found out of a job before anything else is found out once, and kept."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from command import TOY

from paceline.comm.group import Group
from paceline.comm.world import World
from paceline.launch import agreeing
from paceline.launch.agreeing import agree_on_images, agree_on_precision
from paceline.launch.spec import RunSpec
from paceline.load import load_job_file
from paceline.measure import store
from paceline.records import Cluster, Host
from paceline.train import image_format
from paceline.train.session import Datasets

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv(store.VARIABLE, str(tmp_path / "cache"))
    return tmp_path / "cache"


def ways_of_asking(cores: int = 1, batch_size: str = "64", **settings: Any) -> dict[str, Any]:
    host = Host(name="a", device="cpu", device_name="", cores=cores, memory_bytes=1 << 30, workers=1)
    loaded = load_job_file(str(TOY), {"batch_size": batch_size})
    return {
        "spec": RunSpec(job_file=str(TOY), out="", **settings),
        "loaded": loaded,
        "datasets": Datasets(loaded.job, 0),
        "world": World(0, 1, 0, 1, CPU, 10.0),
        "everyone": Group.alone(CPU),
        "cluster": Cluster(hosts=(host,)),
    }


def test_a_precision_that_gains_about_as_much_as_it_must_stays_what_it_was(monkeypatch, cache):
    timed: list[str] = []

    def choose(wanted: str, *_: Any, **__: Any) -> tuple[str, str]:
        timed.append(wanted)
        return ("bf16", "fp32")[len(timed) % 2], f"found by number {len(timed)}"

    monkeypatch.setattr(agreeing, "choose_precision", choose)
    first = agree_on_precision(**ways_of_asking())
    assert first == ("fp32", "found by number 1")
    assert agree_on_precision(**ways_of_asking()) == first
    assert timed == ["auto"]
    # Another machine, another job, a wish, and a new measurement.
    assert agree_on_precision(**ways_of_asking(cores=2))[0] == "bf16"
    assert agree_on_precision(**ways_of_asking(batch_size="32"))[0] == "fp32"
    assert agree_on_precision(**ways_of_asking(precision="bf16"))[1] == "found by number 4"
    assert agree_on_precision(**ways_of_asking()) == first
    renewed = agree_on_precision(**ways_of_asking(remeasure=True))
    assert renewed == ("fp32", "found by number 5")
    assert agree_on_precision(**ways_of_asking()) == renewed
    for file in cache.rglob("*.json"):
        file.write_text("no json")
    assert agree_on_precision(**ways_of_asking()) == ("bf16", "found by number 6")


def test_how_images_lie_is_found_out_once_in_each_precision(monkeypatch):
    ratios = iter((0.85, None, 0.7))
    monkeypatch.setattr(image_format, "_measure", lambda *_: next(ratios))

    def agreed(precision: str, **settings: Any) -> float | None:
        asked = ways_of_asking(**settings)
        agree_on_images(**asked, precision=precision)
        assert asked["datasets"].images.is_decided
        return asked["datasets"].images.ratio

    assert [agreed("fp32"), agreed("fp32")] == [0.85, 0.85]
    assert [agreed("bf16"), agreed("bf16")] == [None, None]
    assert [agreed("fp32", remeasure=True), agreed("fp32")] == [0.7, 0.7]
