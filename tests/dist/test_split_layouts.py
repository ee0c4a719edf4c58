"""Invariant 1 where the model is split: every layout trains what one process of plain PyTorch trains."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import train_plainly
from safetensors.torch import load_model
from split_jobs import SPLIT_JOBS

from paceline.records import Proof

pytestmark = pytest.mark.timeout(600)

ON_FOUR = [
    "tp=2,sequence=on",
    "pp=2,micro=2",
    "dp_shard=2",
    "dp_shard=4,zero=1",
    "dp_shard=2,zero=2,micro=2",
    "dp_replicate=2,dp_shard=2",
    "dp_replicate=2,tp=2",
    "dp_shard=2,tp=2,recompute=full",
    "pp=2,tp=2,micro=3,sequence=on",
    "pp=2,dp_replicate=2,micro=2,recompute=selective",
    "pp=2,dp_shard=2,micro=2",
]
OWN = ("transformer", "unet", "shared", "torch_encoder", "deep")
"""Jobs in all layouts; the others, which are about the batch, in some."""
PROVEN = [
    (name, layout)
    for name in SPLIT_JOBS
    for layout in (ON_FOUR if name in OWN else ON_FOUR[:3] + ON_FOUR[7:])
]
ON_EIGHT = [
    "pp=2,dp_shard=2,tp=2,micro=2",
    "pp=2,dp_replicate=2,tp=2,micro=2",
    "dp_replicate=2,dp_shard=2,tp=2",
]
SCHEDULED = [
    "pp=2,micro=4,schedule=gpipe",
    "pp=2,micro=3,schedule=interleaved",
    "pp=2,micro=4,schedule=bfs,stages=3",
    "pp=2,micro=4,schedule=zb-h1",
    "pp=2,micro=4,schedule=zbv",
    "pp=4,micro=6",
    "pp=4,micro=4,schedule=zb-h1",
]
TRAINED = [
    (name, layout)
    for name in ("transformer", "unet", "deep", "one_sample_last", "schedule")
    for layout in ("tp=2", "pp=2,micro=2", "dp_shard=2", "pp=2,dp_shard=2,micro=2")
]
OUT = {"unused": ("pp",)}
"""A model whose pieces are chosen by the data cannot be cut."""


def launch(directory: Path, workers: int, prove: list[Any], train: list[Any]) -> dict[str, str]:
    asked = directory / "asked.json"
    asked.write_text(json.dumps({"prove": prove, "train": train}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={workers}"]
    process = subprocess.run(
        [*command, str(Path(__file__).parent / "split_worker.py"), str(asked), str(directory)],
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert process.returncode == 0, process.stderr[:6000]
    proofs: dict[str, str] = json.loads((directory / "proofs.json").read_text())
    return proofs


@pytest.fixture(scope="module")
def on_four(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], Path]:
    directory = tmp_path_factory.mktemp("four")
    prove = PROVEN + [(name, layout) for name in ("transformer", "deep") for layout in SCHEDULED]
    return launch(directory, 4, prove, []), directory


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("trained")
    launch(directory, 4, [], TRAINED)
    return directory


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    directory = tmp_path_factory.mktemp("eight")
    prove = [(n, layout) for n in ("transformer", "batch_norm", "unused") for layout in ON_EIGHT]
    return launch(directory, 8, prove, [])


def assert_proven(text: str, name: str, layout: str) -> None:
    if any(f"{axis}=" in layout for axis in OUT.get(name, ())):
        assert text.startswith("the model "), text
        assert "Next step: " in text
        return
    proof = Proof.model_validate_json(text)
    assert proof.status == "equal", proof.what_differs
    assert proof.compared > 10


@pytest.mark.parametrize(("name", "layout"), PROVEN)
def test_every_layout_of_two_and_four_workers_is_proven(name, layout, on_four):
    assert_proven(on_four[0][f"{name}/{layout}"], name, layout)


@pytest.mark.parametrize("layout", SCHEDULED)
@pytest.mark.parametrize("name", ["transformer", "deep"])
def test_every_schedule_is_proven(name, layout, on_four):
    assert_proven(on_four[0][f"{name}/{layout}"], name, layout)


@pytest.mark.parametrize("layout", ON_EIGHT)
@pytest.mark.parametrize("name", ["transformer", "batch_norm", "unused"])
def test_three_axes_on_eight_workers_are_proven(name, layout, on_eight):
    assert_proven(on_eight[f"{name}/{layout}"], name, layout)


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    found = {}
    for name, layout in TRAINED:
        micro = 2 if "micro=2" in layout else 1
        found[f"{name}/{layout}"] = train_plainly(
            SPLIT_JOBS[name][0],
            micro,
            seed=7,
        )
    return found


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_whole_runs_stay_together(name, layout, trained, plain):
    runs = torch.load(trained / "runs.pt", weights_only=True)
    found, wanted = runs[f"{name}/{layout}"], plain[f"{name}/{layout}"]
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["metrics"], wanted["metrics"].to(found["metrics"]), rtol=1e-3, atol=1e-4)
    for key in (key for key in wanted if key.startswith("state.") and key in found):
        torch.testing.assert_close(
            found[key], wanted[key], rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_saved_weights_load_into_the_unsplit_module_bit_for_bit(name, layout, trained):
    runs = torch.load(trained / "runs.pt", weights_only=True)
    model = SPLIT_JOBS[name][0].model()
    load_model(model, str(trained / name / layout / "weights.safetensors"))
    loaded = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in loaded.items():
        assert torch.equal(value, runs[f"{name}/{layout}"][f"state.{key}"]), key
