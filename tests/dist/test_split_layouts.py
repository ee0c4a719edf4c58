"""Invariant 1 where the model is split: every layout trains what one process of plain PyTorch trains."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from groups import run_group
from reference import train_plainly
from safetensors.torch import load_model
from split_jobs import SPLIT_JOBS
from split_worker import prove_and_train

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
"""Jobs in all layouts; the others, which are about the batch, in each single way and in some products, by turns."""
PROVEN = [
    (name, layout)
    for number, name in enumerate(SPLIT_JOBS)
    for layout in (ON_FOUR if name in OWN else ON_FOUR[:3] + ON_FOUR[7 + number % 2 :: 2])
]
PROVEN.append(("batch_norm", "pp=2,dp_replicate=2,micro=12"))
"""Each worker has one sample of a micro-batch, and the statistics of two."""
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


LIMITS = {"timeout_s": 60.0, "limit_s": 500.0}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trained")


@pytest.fixture(scope="module")
def on_four(folder: Path) -> dict[str, str]:
    prove = PROVEN + [(name, layout) for name in ("transformer", "deep") for layout in SCHEDULED]
    return run_group(prove_and_train, 4, prove, TRAINED, folder, **LIMITS)[0]


@pytest.fixture(scope="module")
def trained(on_four: dict[str, str], folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / "runs.pt", weights_only=True)


@pytest.fixture(scope="module")
def on_eight(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    prove = [(n, layout) for n in ("transformer", "batch_norm", "unused") for layout in ON_EIGHT]
    return run_group(prove_and_train, 8, prove, [], tmp_path_factory.mktemp("eight"), **LIMITS)[0]


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
    assert_proven(on_four[f"{name}/{layout}"], name, layout)


@pytest.mark.parametrize("layout", SCHEDULED)
@pytest.mark.parametrize("name", ["transformer", "deep"])
def test_every_schedule_is_proven(name, layout, on_four):
    assert_proven(on_four[f"{name}/{layout}"], name, layout)


@pytest.mark.parametrize("layout", ON_EIGHT)
@pytest.mark.parametrize("name", ["transformer", "batch_norm", "unused"])
def test_three_axes_on_eight_workers_are_proven(name, layout, on_eight):
    assert_proven(on_eight[f"{name}/{layout}"], name, layout)


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    # Layouts with as many micro-batches are compared with one training.
    of_micro = functools.cache(lambda name, micro: train_plainly(SPLIT_JOBS[name][0], micro, seed=7))
    return {f"{name}/{layout}": of_micro(name, 2 if "micro=2" in layout else 1) for name, layout in TRAINED}


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_whole_runs_stay_together(name, layout, trained, plain):
    found, wanted = trained[f"{name}/{layout}"], plain[f"{name}/{layout}"]
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["metrics"], wanted["metrics"].to(found["metrics"]), rtol=1e-3, atol=1e-4)
    for key in (key for key in wanted if key.startswith("state.") and key in found):
        torch.testing.assert_close(
            found[key], wanted[key], rtol=1e-3, atol=1e-3, msg=lambda m, k=key: f"{k}: {m}"
        )


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_saved_weights_load_into_the_unsplit_module_bit_for_bit(name, layout, trained, folder):
    model = SPLIT_JOBS[name][0].model()
    load_model(model, str(folder / name / layout / "weights.safetensors"))
    loaded = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for key, value in loaded.items():
        assert torch.equal(value, trained[f"{name}/{layout}"][f"state.{key}"]), key
