"""What is wrong with a job is said before any worker starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from paceline.comm.world import TRANSPORT_VARIABLE, listen_on_loopback
from paceline.errors import (
    DataError,
    JobError,
    LaunchError,
    LayoutError,
    LossError,
    OptionError,
    PacelineError,
    RunError,
)
from paceline.launch.local import free_port
from paceline.launch.preflight import preflight
from paceline.launch.spec import RunSpec
from paceline.train.target import Length

TOY = str(Path(__file__).parents[1] / "toy.py")


def check(device: str = "cpu", max_workers: int = 4, **fields: object) -> None:
    settings = {k: str(v) for k, v in fields.pop("settings", {}).items()}  # type: ignore[attr-defined]
    preflight(RunSpec(job_file=TOY, out="", settings=settings, **fields), device, max_workers)


def test_a_good_job_passes():
    check(layout="dp_replicate=4", until="accuracy=0.9")


@pytest.mark.parametrize(
    ("mode", "kind", "words", "next_step"),
    [
        ("vector_loss", LossError, "shape (2,), not a scalar", "return the mean"),
        ("number_loss", LossError, "the loss is float, not a tensor", "return a scalar tensor"),
        ("detached_loss", LossError, "does not depend on the model's parameters", "from the model's outputs"),
        ("nan_loss", LossError, "the loss is nan in step 1", "lower the learning rate"),
        ("wrong_shape", JobError, "a training step on two samples raised ValueError", "model.forward"),
        ("data_raises", DataError, "data('train') raised FileNotFoundError: no such file", "Python shell"),
    ],
)
def test_a_job_that_cannot_train(mode, kind, words, next_step):
    with pytest.raises(kind) as caught:
        check(settings={"mode": mode})
    assert words in str(caught.value)
    assert next_step in caught.value.next_step


def test_an_empty_data_set():
    with pytest.raises(DataError, match=r"data\('train'\) is empty") as caught:
        check(settings={"length": 0})
    assert "a filter that drops everything" in caught.value.cause


def test_a_batch_that_the_layout_cannot_divide_names_sizes_that_work():
    with pytest.raises(LayoutError, match="12 samples cannot be divided by layout dp_replicate=5") as caught:
        check(layout="dp_replicate=5")
    assert "batch_size of 10 or 15" in caught.value.next_step


def test_more_workers_than_gpus(monkeypatch):
    monkeypatch.delenv(TRANSPORT_VARIABLE, raising=False)
    with pytest.raises(LayoutError, match="needs 6 workers, and this host has 4 GPUs"):
        check(device="cuda", layout="dp_replicate=6")


def test_gpus_with_a_transport_of_cpus_in_the_environment(monkeypatch):
    monkeypatch.setenv(TRANSPORT_VARIABLE, "gloo")
    with pytest.raises(
        OptionError, match="PACELINE_TRANSPORT of the environment is 'gloo', and the workers compute"
    ):
        check(device="cuda", layout="dp_replicate=2")


def test_an_unknown_transport_in_the_environment(monkeypatch):
    monkeypatch.setenv(TRANSPORT_VARIABLE, "pigeon")
    with pytest.raises(OptionError, match="PACELINE_TRANSPORT of the environment is 'pigeon'"):
        check(layout="dp_replicate=1")


def test_an_unknown_matrix_library_in_the_environment(monkeypatch):
    monkeypatch.setenv("PACELINE_MATMUL", "cublas")
    with pytest.raises(OptionError, match="PACELINE_MATMUL of the environment is 'cublas'"):
        check(layout="dp_replicate=1")


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"layout": "data_parallel=2"}, "unknown key 'data_parallel'"),
        ({"until": "f1=0.5"}, "no metric 'f1'"),
        ({"steps": 0}, "--steps is 0"),
        ({"precision": "fp8"}, "--precision is 'fp8'"),
        ({"transport": "pigeon"}, "--transport is 'pigeon'"),
        ({"settings": {"depth": 3}}, "no option 'depth'"),
    ],
)
def test_arguments_that_cannot_be(fields, words):
    with pytest.raises(PacelineError) as caught:
        check(**fields)
    assert words in str(caught.value)
    assert caught.value.next_step


def test_a_port_in_use():
    with listen_on_loopback(0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=f"port {port} of 127.0.0.1 cannot be used") as caught:
            free_port(port)
    assert "leave out --port" in caught.value.next_step


def test_no_length(tmp_path):
    text = Path(TOY).read_text().replace("epochs=3,", "")
    path = tmp_path / "endless.py"
    path.write_text(text)
    with pytest.raises(RunError, match="the training has no length"):
        preflight(RunSpec(job_file=str(path), out=""), "cpu", 2)
    for purpose in ("verify", "plan", "measure"):
        spec = RunSpec(purpose=purpose, job_file=str(path), out="")
        loaded = preflight(spec, "cpu", 2)
        assert spec.length(loaded.job, 7) == Length(7, 1)
        assert spec.model_copy(update={"steps": 3}).length(loaded.job, 7) == Length(3, None)
