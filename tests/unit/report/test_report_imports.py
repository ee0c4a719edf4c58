from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import paceline.report

_USE_ALL = """
import sys, pkgutil, importlib, pathlib
import paceline.report
for module in pkgutil.iter_modules(paceline.report.__path__):
    importlib.import_module(f"paceline.report.{module.name}")
from paceline.report import write_report
from paceline.report.tensorboard import TensorBoardWriter
run = pathlib.Path(sys.argv[1])
run.mkdir()
(run / "events.jsonl").write_text("")
TensorBoardWriter(run / "tensorboard").close()
write_report(run)
print(sorted(name for name in sys.modules if name.split(".")[0] == "torch"))
foreign = {name for name in sys.modules if name.startswith("paceline.")} - {
    "paceline._version", "paceline.errors", "paceline.records", "paceline.events"}
print(sorted(name for name in foreign if not name.startswith(("paceline.report", "paceline.plan"))))
"""


def _python(*arguments: str) -> str:
    source = str(Path(paceline.report.__file__).parents[2])
    path = os.pathsep.join(filter(None, (source, os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, check=True, capture_output=True, text=True
    ).stdout


def test_the_room_imports_no_torch_and_no_higher_room(tmp_path: Path) -> None:
    assert _python("-c", _USE_ALL, str(tmp_path / "run")) == "[]\n[]\n"


def test_a_display_does_not_wait_for_matplotlib() -> None:
    code = "import sys, paceline.report.terminal; print('matplotlib' in sys.modules, 'numpy' in sys.modules)"
    assert _python("-c", code) == "False False\n"
