from __future__ import annotations

from pathlib import Path

import pytest

import paceline
from paceline.errors import JobError, JobFileError, OptionError
from paceline.load import load_job_file

HEAD = "import paceline\n"
JOB = "job = paceline.Job(model=print, data=print, loss=print, optimizer=print, batch_size=4)\n"


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "my_job.py"
    path.write_text(text)
    return path


def test_a_job_file_gives_its_job_name_and_options(tmp_path):
    loaded = load_job_file(
        write(tmp_path, HEAD + "o = paceline.options(width=3, rate=0.1, deep=False, data='a')\n" + JOB),
        {"width": "7", "deep": "yes", "rate": "1e-3"},
    )
    assert loaded.name == "my_job"
    assert loaded.options == {"width": 7, "rate": 1e-3, "deep": True, "data": "a"}


def test_options_outside_a_job_file_are_their_defaults():
    assert paceline.options(width=3).width == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (HEAD, "has no name 'job'"),
        (HEAD + "job = 3\n", "has a 'job' of type int"),
        (HEAD + "x = 1\nx.nothing\n", "AttributeError: 'int' object has no attribute 'nothing' (line 3)"),
        (HEAD + "def f(:\n", "SyntaxError"),
        ("import no_such_package\n" + JOB, "the package 'no_such_package' is not installed here"),
        (HEAD + "import sys\nsys.exit(3)\n", "SystemExit"),
    ],
)
def test_a_job_file_that_cannot_be_used_says_why(tmp_path, text, words):
    with pytest.raises(JobFileError) as caught:
        load_job_file(write(tmp_path, text))
    assert words in str(caught.value)
    assert "my_job.py" in str(caught.value)
    assert caught.value.next_step


def test_a_missing_file(tmp_path):
    with pytest.raises(JobFileError, match="there is no job file"):
        load_job_file(tmp_path / "nowhere.py")


def test_an_unknown_option_names_the_declared_ones(tmp_path):
    path = write(tmp_path, HEAD + "paceline.options(width=3, depth=2)\n" + JOB)
    with pytest.raises(OptionError, match="has no option 'widht'") as caught:
        load_job_file(path, {"widht": "7"})
    assert "perhaps 'width' was meant" in caught.value.cause
    assert "width=3, depth=2" in caught.value.next_step


@pytest.mark.parametrize(("key", "value"), [("width", "wide"), ("deep", "maybe"), ("rate", "fast")])
def test_an_ill_typed_option_is_refused(tmp_path, key, value):
    path = write(tmp_path, HEAD + "paceline.options(width=3, deep=False, rate=0.5)\n" + JOB)
    with pytest.raises(OptionError, match=f"option {key}='{value}' cannot be read"):
        load_job_file(path, {key: value})


def test_errors_of_our_own_pass_through_a_job_file(tmp_path):
    with pytest.raises(paceline.DataError, match="no data"):
        load_job_file(write(tmp_path, HEAD + "raise paceline.DataError('no data')\n"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"batch_size": 0}, "batch_size is 0"),
        ({"batch_size": True}, "batch_size is True"),
        ({"model": None}, "model is NoneType, not a function"),
        ({"metrics": {"loss": print}}, "metrics has an entry 'loss'"),
        ({"finish": {"rmse": print}}, "finish has an entry 'rmse', which is no metric"),
        ({"clip_norm": -1.0}, "clip_norm is -1.0"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"loader_workers": -1}, "loader_workers is -1"),
    ],
)
def test_a_job_checks_its_fields(change, words):
    fields = {"model": print, "data": print, "loss": print, "optimizer": print, "batch_size": 4, **change}
    with pytest.raises(JobError) as caught:
        paceline.Job(**fields)
    assert words in str(caught.value)
