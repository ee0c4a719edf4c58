"""`paceline verify`, and the proof before training: right layouts pass, planted errors are named."""

from __future__ import annotations

import pytest
from command import TOY, of_kind, paceline, read_events
from groups import run_group
from proof_worker import prove_with

from paceline.records import Proof


def proof_of(error: str, job: str, transport: str = "auto") -> str:
    """What rank 0 of two real processes finds after the error was planted in them."""
    return run_group(prove_with, 2, error, job, transport=transport, timeout_s=60.0)[0]


@pytest.mark.parametrize("transport", ["auto", "gloo"])
@pytest.mark.parametrize("job", ["batch_norm", "weighted_micro", "dropout"])
def test_right_layouts_are_proven(job, transport):
    proof = Proof.model_validate_json(proof_of("nothing", job, transport))
    assert proof.status == "equal", proof.worst[0].describe()
    assert proof.compared > 10
    assert proof.samples == 48
    assert proof.switched_off == (("dropout",) if job == "dropout" else ())


@pytest.mark.parametrize(
    ("error", "job", "transport", "kind", "name"),
    [
        ("forget_the_reduction", "plain", "gloo", "gradient", None),
        ("scale_wrongly", "plain", "gloo", "gradient", None),
        ("forget_one_parameter", "plain", "gloo", "gradient", "0.bias"),
        ("normalise_locally", "batch_norm", "auto", "buffer", None),
        ("clip_before_the_sum", "clipped", "gloo", "gradient", None),
        pytest.param("skip_the_sum", "plain", "auto", "gradient", None, marks=pytest.mark.shared_memory),
        pytest.param("keep_a_share_back", "plain", "auto", "parameter", None, marks=pytest.mark.shared_memory),
        pytest.param("update_too_early", "plain", "auto", "gradient", None, marks=pytest.mark.shared_memory),
    ],
)
def test_a_planted_error_is_caught_and_named(error, job, transport, kind, name):
    text = proof_of(error, job, transport)
    proof = Proof.model_validate_json(text)
    assert proof.status == "different"
    assert proof.in_float64 or proof.parted, "float64 was asked, or the workers had parted anyway"
    wrong = [d for d in proof.worst if not d.within_tolerance]
    assert kind in {d.kind for d in wrong}
    if name is not None:
        first = min(d.step for d in wrong)
        assert {d.name for d in wrong if d.kind == "gradient" and d.step == first} == {name}


def test_what_is_gone_in_float64_was_rounding():
    proof = Proof.model_validate_json(proof_of("round_roughly", "batch_norm", "gloo"))
    assert proof.worst[0].relative_error == pytest.approx(1e-3, rel=0.1)
    assert proof.in_float64
    assert proof.in_float64[0].relative_error < 1e-10
    assert proof.status == "equal"


def test_workers_that_start_apart_are_caught():
    proof = Proof.model_validate_json(proof_of("start_apart", "plain", "gloo"))
    assert proof.status == "different"
    assert any(d.kind == "gradient" and not d.within_tolerance for d in proof.worst)


def test_a_worker_whose_updates_drift_is_named():
    """Rank 0 does what one process does; the others do not."""
    process = paceline("verify", str(TOY), "--layout=dp_replicate=2", "--set=mode=drift")
    assert process.returncode == 1
    assert "the parameters of rank 1 differ from rank 0's, first in inner.weight" in process.stdout


def test_verify_prints_the_worst_and_a_verdict():
    process = paceline("verify", str(TOY), "--layout=dp_replicate=2,micro=2")
    assert process.returncode == 0, process.stdout + process.stderr
    assert "layout dp_replicate=2,micro=2 against one process" in process.stdout
    assert "Equal to one process of plain PyTorch" in process.stdout
    assert "inner.weight" in process.stdout


def test_verify_of_a_loss_that_mixes_samples_fails():
    process = paceline("verify", str(TOY), "--layout=dp_replicate=2", "--set=mode=contrast")
    assert process.returncode == 1
    assert "DIFFERENT from one process of plain PyTorch" in process.stdout
    assert process.stderr == ""


def test_a_job_that_insists_on_float32_is_judged_by_that_and_nobody_waits():
    process = paceline(
        "verify", str(TOY), "--layout=dp_replicate=2", "--set=mode=narrow", "--timeout=60", timeout_s=50
    )
    assert process.returncode == 1
    assert "DIFFERENT from one process of plain PyTorch" in process.stdout
    assert "It could not be judged in float64: a step in one process failed" in process.stdout
    assert process.stderr == ""


def test_a_model_with_noise_of_its_own_is_not_comparable_and_trains_all_the_same(tmp_path):
    process = paceline("verify", str(TOY), "--layout=dp_replicate=2", "--set=mode=random")
    assert process.returncode == 1
    assert "Not proven: the model draws random numbers that cannot be switched off" in process.stdout
    process = paceline("train", str(TOY), "--layout=dp_replicate=2", "--set=mode=random", f"--out={tmp_path}")
    assert process.returncode == 0, process.stderr
    assert of_kind(read_events(tmp_path), "proof")[0]["status"] == "not comparable"


def test_a_layout_that_trains_something_else_is_refused(tmp_path):
    arguments = ("train", str(TOY), "--layout=dp_replicate=2", "--set=mode=contrast")
    process = paceline(*arguments, f"--out={tmp_path / 'refused'}")
    assert process.returncode == 1
    assert "layout dp_replicate=2 does not train what one process trains: " in process.stderr
    assert not of_kind(read_events(tmp_path / "refused"), "step")
    process = paceline(*arguments, "--no-verify", f"--out={tmp_path / 'forced'}")
    assert process.returncode == 0, process.stderr


def test_the_proof_is_recorded_before_the_first_step(tmp_path):
    process = paceline("train", str(TOY), "--layout=dp_replicate=2", f"--out={tmp_path}")
    assert process.returncode == 0, process.stderr
    kinds = [event["event"] for event in read_events(tmp_path)]
    assert kinds.index("plan") < kinds.index("proof") < kinds.index("step")
    (proof,) = of_kind(read_events(tmp_path), "proof")
    assert proof["status"] == "equal"
    assert "Equal to one process" in process.stdout.replace("\n", " ")
    assert "Equal to one process" in (tmp_path / "report.html").read_text()
