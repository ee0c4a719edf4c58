"""Invariant 1: every number of workers trains the same thing as one process of plain PyTorch."""

from __future__ import annotations

import pytest
import torch
from equality_worker import train_all
from groups import run_group
from jobs import JOBS
from reference import train_plainly

TOLERANCE = 1e-5
SIZES = (1, 2, 3, 4)
WAYS = ("1", "2", "3", "4", "2 gloo", "3 gloo")
DETERMINISTIC = [name for name in JOBS if name != "dropout"]

AMPLIFICATION = {"batch_norm_micro": 20}
"""Its last micro-batches are of two samples, whose batch norm magnifies rounding: in plain PyTorch a change
of the inputs by one unit in the last place moves the result of the run by 4e-4."""


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, torch.Tensor]]:
    """All jobs on 1, 2, 3 and 4 workers: one launch of four real processes."""
    path = tmp_path_factory.mktemp("equality") / "results.pt"
    run_group(train_all, 4, path, timeout_s=60.0, limit_s=300.0)
    results: dict[str, dict[str, torch.Tensor]] = torch.load(path, weights_only=True)
    return results


@pytest.fixture(scope="module")
def plain() -> dict[str, dict[str, torch.Tensor]]:
    return {name: train_plainly(*JOBS[name], seed=7) for name in DETERMINISTIC}


def relative_error(found: torch.Tensor, wanted: torch.Tensor, floor: float = 0.0) -> float:
    """‖found − wanted‖ / ‖wanted‖, where the norm counts for at least `floor`."""
    return float((found.double() - wanted.double()).norm() / max(float(wanted.double().norm()), floor, 1e-30))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_first_steps_have_the_gradients_of_one_process(name, way, trained, plain):
    found, wanted = trained[f"{name}/{way}"], plain[name]
    gradients = [key for key in wanted if key.startswith("gradient.")]
    assert gradients
    assert {key for key in found if key.startswith("gradient.")} == set(gradients)
    for step in (0, 1):
        keys = [key for key in gradients if key.startswith(f"gradient.{step}.")]
        total = torch.cat([wanted[key].flatten() for key in keys]).norm()
        for key in keys:
            # A gradient that is zero but for rounding is held against the whole gradient's norm.
            assert relative_error(found[key], wanted[key], floor=1e-2 * float(total)) <= TOLERANCE, key
    assert relative_error(found["losses"][:2], wanted["losses"][:2]) <= TOLERANCE


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", DETERMINISTIC)
def test_whole_runs_stay_together(name, way, trained, plain):
    found, wanted = trained[f"{name}/{way}"], plain[name]
    assert len(found["losses"]) == len(wanted["losses"])
    torch.testing.assert_close(found["losses"], wanted["losses"], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found["metrics"], wanted["metrics"].to(found["metrics"]), rtol=1e-3, atol=1e-4)
    atol = 1e-4 * AMPLIFICATION.get(name, 1)
    for key in (key for key in wanted if key.startswith("state.")):
        torch.testing.assert_close(
            found[key], wanted[key], rtol=1e-3, atol=atol, msg=lambda m, k=key: f"{k}: {m}"
        )


def test_an_expert_that_no_sample_uses_is_left_alone(trained):
    """Momentum and weight decay would move it, were its gradient zero instead of None."""
    for size in SIZES[1:]:
        assert torch.equal(
            trained[f"unused/{size}"]["state.experts.3.weight"], trained["unused/1"]["state.experts.3.weight"]
        )


def test_dropout_is_reproduced_by_the_same_layout(trained):
    first, second = trained["dropout/2"], trained["dropout/again"]
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_dropout_masks_of_the_workers_differ(trained):
    """Shares draw different masks: were they the same, two workers would drop the same units."""
    assert not torch.allclose(
        trained["dropout/1"]["gradient.0.0"], trained["dropout/2"]["gradient.0.0"], rtol=1e-3
    )
