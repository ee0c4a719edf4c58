"""`paceline train` from end to end, and the same workers under torchrun."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from command import ENVIRONMENT, TOY, of_kind, paceline, read_events
from safetensors.torch import load_model

from paceline.load import load_job


@pytest.fixture(scope="module")
def automatic(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """One run with `--layout auto`."""
    out = tmp_path_factory.mktemp("auto") / "run"
    process = paceline("train", str(TOY), f"--out={out}", "--seed=3", "--precision=fp32")
    assert process.returncode == 0, process.stdout + process.stderr
    return out, process


def test_the_events_tell_the_whole_run_in_order(automatic):
    events = read_events(automatic[0])
    kinds = [event["event"] for event in events]
    assert kinds[0] == "run"
    assert kinds[-1] == "end"
    assert kinds.index("trial") < kinds.index("plan") < kinds.index("step")
    steps = of_kind(events, "step")
    assert [s["step"] for s in steps] == list(range(1, 16))
    assert [s["samples"] for s in steps] == [12] * 15
    assert [s["epoch"] for s in steps] == [0] * 5 + [1] * 5 + [2] * 5
    assert [e["step"] for e in of_kind(events, "evaluation")] == [4, 8, 12, 15]
    end = events[-1]
    assert end["status"] == "finished"
    assert end["samples"] == 180
    assert end["forecast_step_s"] > 0
    assert end["measured_step_s"] > 0
    assert "weight" in end["metrics"], "the showcase's numbers join the metrics"


def test_the_chosen_layout_is_the_fastest_that_was_timed_or_one_process(automatic):
    events = read_events(automatic[0])
    trials, (plan,) = of_kind(events, "trial"), of_kind(events, "plan")
    assert {trial["workers"] for trial in trials} >= {1}
    assert all(len(trial["step_s"]) >= 3 for trial in trials)
    assert plan["layout"] in [trial["layout"] for trial in trials]
    assert len(of_kind(events, "ranks")[0]["ranks"]) == plan["layout"]["dp_replicate"]


def test_what_is_printed_tells_layout_metrics_and_where_things_are(automatic):
    out, process = automatic
    assert "timed 1 worker × 1 thread" in process.stdout
    assert "accuracy" in process.stdout
    assert str(out) in process.stdout.replace("\n", "")
    assert process.stderr == ""


def test_the_trained_weights_load_into_the_jobs_own_model(automatic):
    out, _ = automatic
    model = load_job(TOY).model()
    missing, unexpected = load_model(model, out / "weights.safetensors")
    assert not missing
    assert not unexpected
    shown = of_kind(read_events(out), "showcase")[0]["numbers"]["weight"]
    assert model.inner.weight.sum().item() == pytest.approx(shown, rel=1e-6)


def test_page_figures_and_tensorboard_are_there(automatic):
    out, _ = automatic
    page = (out / "report.html").read_text()
    assert "&lt;b&gt;trained&lt;/b&gt;" in page, "texts of the job are escaped"
    assert len(list((out / "figures").glob("*.png"))) >= 4
    assert list((out / "tensorboard").iterdir())


def test_report_is_written_again_from_the_events_alone(automatic):
    out, _ = automatic
    (out / "report.html").unlink()
    process = paceline("report", str(out))
    assert process.returncode == 0, process.stderr
    assert (out / "report.html").is_file()


def test_until_stops_at_the_target_and_quiet_prints_nothing(tmp_path):
    process = paceline(
        "train", str(TOY), "--layout=dp_replicate=2,micro=2", "--epochs=200", "--until=accuracy=0.9", "--quiet",
        f"--out={tmp_path}", "--set=loader_workers=1", "--transport=gloo",
        "--set=statistics=0",
    )  # fmt: skip
    assert process.returncode == 0, process.stderr
    assert process.stdout == ""
    events = read_events(tmp_path)
    assert of_kind(events, "plan")[0]["transport"] == "gloo"
    assert events[-1]["status"] == "target reached"
    evaluations = of_kind(events, "evaluation")
    assert evaluations[0]["step"] == 0
    assert all(e["metrics"]["accuracy"] < 0.9 for e in evaluations[:-1])
    assert evaluations[-1]["metrics"]["accuracy"] >= 0.9
    assert events[-1]["steps"] % 4 == 0
    # Batch norms without running statistics: rank 0 shows the model by itself, the others do not wait for it.
    assert "output" in of_kind(events, "showcase")[0]["numbers"]


def torchrun(*arguments: str, environment: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *arguments],
        capture_output=True,
        text=True,
        timeout=150,
        env={**ENVIRONMENT, **(environment or {})},
        check=False,
    )


def test_a_block_that_cannot_be_divided_is_named_and_the_rest_trains(tmp_path):
    out = tmp_path / "run"
    process = paceline("train", str(TOY), "--layout=tp=2", "--set=mode=unseen", "--steps=2", f"--out={out}")
    assert process.returncode == 0, process.stderr
    events = read_events(out)
    assert [list(proof["left_whole"]) for proof in of_kind(events, "proof")] == [["unseen"]]
    (message,) = [m["text"] for m in of_kind(events, "message") if "divided" in m["text"]]
    assert message.startswith("unseen is not divided by tp, as it would not compute the same on parts (")
    assert message in process.stdout.replace("\n", " ")
    assert len(of_kind(events, "step")) == 2


def test_the_same_command_under_torchrun_trains_the_same(automatic, tmp_path, default_transport):
    process = torchrun(
        "-m",
        "paceline",
        "train",
        str(TOY),
        "--layout=dp_replicate=2",
        "--seed=3",
        "--precision=fp32",
        f"--out={tmp_path / 'run'}",
    )
    assert process.returncode == 0, process.stdout + process.stderr
    assert "finished" in process.stdout
    events = read_events(tmp_path / "run")
    assert of_kind(events, "plan")[0]["transport"] == default_transport
    losses = [s["loss"] for s in of_kind(events, "step")]
    wanted = [s["loss"] for s in of_kind(read_events(automatic[0]), "step")]
    torch.testing.assert_close(torch.tensor(losses), torch.tensor(wanted), rtol=1e-4, atol=1e-5)


def test_an_error_under_torchrun_is_plain_too(tmp_path):
    process = torchrun(
        "-m", "paceline", "train", str(TOY), "--set=mode=raise", f"--out={tmp_path / 'run'}",
        "--layout=dp_replicate=2", "--timeout=20",
    )  # fmt: skip
    assert process.returncode != 0
    assert "rank 1 raised ValueError: a planted error" in process.stderr


SESSION_LOOP = """
import sys
import paceline
job = paceline.load_job(sys.argv[1])
with paceline.Session(job, seed=3) as session:
    losses = [session.step(batch).loss for batch in session.batches(epochs=2)]
    sys.stdout.write(f"SESSION {session.group.rank} {losses[-1]:.6f} {session.evaluate()['loss']:.6f}\\n")
"""


def test_a_loop_of_ones_own_is_the_same_alone_and_on_two_workers(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(SESSION_LOOP)
    alone = subprocess.run(
        [sys.executable, str(script), str(TOY)],
        capture_output=True, text=True, timeout=100, env=ENVIRONMENT, check=True,
    )  # fmt: skip
    two = torchrun(str(script), str(TOY))
    assert two.returncode == 0, two.stderr
    pattern = r"SESSION (\d) ([\d.]+) ([\d.]+)\n"
    (wanted,) = [numbers[1:] for numbers in re.findall(pattern, alone.stdout)]
    found = sorted(re.findall(pattern, two.stdout))
    assert [f[0] for f in found] == ["0", "1"]
    for numbers in found:
        assert [float(n) for n in numbers[1:]] == pytest.approx([float(n) for n in wanted], rel=1e-3)


def test_a_session_in_a_plain_script_refuses_a_layout_of_several_workers(tmp_path):
    script = tmp_path / "loop.py"
    script.write_text(SESSION_LOOP.replace("seed=3", "'dp_replicate=2'"))
    process = subprocess.run(
        [sys.executable, str(script), str(TOY)],
        capture_output=True, text=True, timeout=100, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert "needs 2 workers, and 1 are here" in process.stderr
    assert "torchrun --nproc-per-node 2" in process.stderr
