"""The rooms: lower ones never import higher ones, and the check that says so can fail."""

from __future__ import annotations

import fnmatch
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import paceline

ROOT = Path(__file__).parents[2]
PUBLIC = {
    "CollectiveError", "DataError", "Job", "JobError", "JobFileError", "LaunchError", "Layout", "LayoutError",
    "LossError", "OptionError", "PacelineError", "RunError", "Session", "WorkerError", "__version__", "load_job",
    "options", "register_shm",
}  # fmt: skip


def lint(directory: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from importlinter.cli import lint_imports_command as c; c()", "--no-cache"],
        cwd=directory,
        env={"PYTHONPATH": str(directory / "src"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_layers_hold():
    process = lint(ROOT)
    assert process.returncode == 0, process.stdout + process.stderr


def test_the_check_sees_a_lower_room_that_imports_a_higher_one(tmp_path):
    shutil.copytree(ROOT / "src", tmp_path / "src")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "src/paceline/plan/choose.py").open("a") as file:
        file.write("\nfrom paceline.train import order  # noqa\n")
    process = lint(tmp_path)
    assert process.returncode != 0
    assert "paceline.plan is not allowed to import paceline.train" in process.stdout


def test_what_must_stay_light_does_not_load_torch():
    code = (
        "import sys, paceline, paceline.plan.choose, paceline.plan.candidates, paceline.load, paceline.events\n"
        "import paceline.report.page, paceline.report.terminal, paceline.report.tensorboard\n"
        "paceline.Job, paceline.Layout, paceline.options, paceline.PacelineError\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_the_public_face_is_pinned():
    assert set(paceline.__all__) == PUBLIC
    assert all(getattr(paceline, name) is not None for name in PUBLIC)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="nothing"):
        paceline.nothing  # noqa: B018


def test_no_folder_of_tests_is_left_out(pytestconfig):
    """pytest's own default leaves out folders called `dist`, without a word."""
    patterns = pytestconfig.getini("norecursedirs")
    folders = [p.name for p in Path(__file__).parents[1].iterdir() if p.is_dir() and p.name != "__pycache__"]
    assert "dist" in folders
    assert not [name for name in folders if any(fnmatch.fnmatch(name, pattern) for pattern in patterns)]
