"""Proves eight layouts of every model in `zoo_models.py` against one process, and writes `docs/models.md`.

    python benchmarks/zoo.py                        # all: about half an hour on two cores
    python benchmarks/zoo.py --only T5 --only BERT  # some, printed only

Eight workers stay up and prove one cell after the other. A cell that kills them, or that is not done in time, is
counted as failed, and the rest goes on with new workers.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from zoo_models import ZOO

from paceline.comm.mesh import make_mesh
from paceline.comm.world import join
from paceline.errors import LayoutError, PacelineError
from paceline.records import Layout, Proof
from paceline.train.proof import prove
from paceline.train.session import Datasets

LAYOUTS = (
    "dp_replicate=2",
    "dp_shard=2",
    "tp=2",
    "pp=2,micro=2",
    "pp=2,tp=2,micro=2",
    "dp_shard=2,tp=2",
    "pp=2,dp_replicate=2,micro=2",
    "pp=2,dp_shard=2,tp=2,micro=2",
)
WORKERS, BATCH_SIZE = 8, 8
CELL_TIMEOUT_S = 120.0
PAGE = Path(__file__).parent.parent / "docs" / "models.md"


def work(cells: Path, results: Path) -> None:
    """One worker: prove the cells that are asked for, in order; rank 0 appends what came out."""
    torch.set_num_threads(1)
    world = join("cpu", timeout_s=CELL_TIMEOUT_S)
    everyone = world.group(world.size)
    assert everyone is not None
    for name, text in json.loads(cells.read_text()):
        begin_s = time.perf_counter()
        outcome = _prove(name, text, world)
        everyone.barrier("between cells")
        if world.rank == 0:
            with open(results, "a") as file:
                file.write(json.dumps([name, text, outcome, round(time.perf_counter() - begin_s, 2)]) + "\n")
    world.leave()


def _prove(name: str, text: str, world) -> dict[str, object]:
    try:
        job = dataclasses.replace(ZOO[name](), batch_size=BATCH_SIZE, loader_workers=0)
        layout = Layout.parse(text)
        layout.check_batch(job.batch_size)
        mesh = make_mesh(world, layout)
        if mesh is None:
            return {}
        return {"proof": prove(job, mesh, Datasets(job, 0), seed=0, device=world.device).to_json()}
    except LayoutError as error:
        return {"refused": f"{error.what} ({error.cause})" if error.cause else error.what}


def run(names: list[str], directory: Path) -> dict[tuple[str, str], dict[str, object]]:
    """All cells of the models `names`, by (model, layout)."""
    waiting = [(name, layout) for name in names for layout in LAYOUTS]
    results = directory / "results.jsonl"
    results.touch()
    found: dict[tuple[str, str], dict[str, object]] = {}
    while waiting:
        cells = directory / "cells.json"
        cells.write_text(json.dumps(waiting))
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={WORKERS}",
        ]
        log = directory / "workers.log"
        with open(log, "w") as file:
            process = subprocess.Popen(
                [*command, __file__, "--work", str(cells), str(results)],
                stdout=file,
                stderr=subprocess.STDOUT,
            )
            _wait(process, results)
        found = {
            (n, t): {**o, "seconds": s} for n, t, o, s in map(json.loads, results.read_text().splitlines())
        }
        waiting = [cell for cell in waiting if tuple(cell) not in found]
        if waiting:
            errors = [
                line for line in log.read_text().splitlines() if "Error: " in line and "Child" not in line
            ]
            reason = errors[0].partition("Error: ")[2] if errors else "no answer in time"
            with open(results, "a") as file:
                file.write(json.dumps([*waiting.pop(0), {"failed": reason[:300]}, 0.0]) + "\n")
    return {(n, t): {**o, "seconds": s} for n, t, o, s in map(json.loads, results.read_text().splitlines())}


def _wait(process: subprocess.Popen[bytes], results: Path) -> None:
    """Until the workers are done, or for longer than a cell may take nothing came out."""
    last_s, size = time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.5)
        if results.stat().st_size != size:
            last_s, size = time.monotonic(), results.stat().st_size
            last = json.loads(results.read_text().splitlines()[-1])
            print(f"{last[0]:26}{last[1]:32}{_cell(last[2])}  {last[3]} s", flush=True)
        if time.monotonic() - last_s > 2 * CELL_TIMEOUT_S:
            process.terminate()
            process.wait(timeout=60)


def _cell(outcome: dict) -> str:
    """What the table says."""
    if "refused" in outcome:
        return "refused"
    if "failed" in outcome:
        return "FAILED"
    proof = Proof.from_json(outcome["proof"])
    if proof.status != "equal":
        return proof.status.upper() if proof.status == "different" else proof.status
    worst = max((d.relative_error or 0.0 for d in proof.in_float64 or proof.worst), default=0.0)
    return f"{worst:.0e}" + (" (float64)" if proof.in_float64 else "")


def page(names: list[str], found: dict[tuple[str, str], dict], minutes: float) -> str:
    """`docs/models.md`."""
    lines = [
        "# Models and layouts",
        "",
        "Each model, as its authors wrote it, in each layout against one process of plain PyTorch: the largest",
        "relative error among loss, gradients, updated parameters and buffers of two steps, or why the layout is out.",
        "`(float64)`: float32 left a doubt, and the same steps in float64 settled it. Small configurations, random",
        f"weights and data; `python benchmarks/zoo.py`, {datetime.date.today()}, torch {torch.__version__}, "
        f"{minutes:.0f} minutes on two cores.",
        "",
        "| model | " + " | ".join(LAYOUTS) + " |",
        "|---" * (len(LAYOUTS) + 1) + "|",
    ]
    reasons: list[str] = []
    for name in names:
        cells = []
        for layout in LAYOUTS:
            outcome = found[name, layout]
            text = _cell(outcome)
            reason = outcome.get("refused") or outcome.get("failed")
            if reason:
                if reason not in reasons:
                    reasons.append(str(reason))
                text += f" [{reasons.index(str(reason)) + 1}]"
            cells.append(text)
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    lines += ["", "| layout | equal | share |", "|---|---|---|"]
    for layout in LAYOUTS:
        equal = sum(_is_equal(found[name, layout]) for name in names)
        lines.append(f"| {layout} | {equal} of {len(names)} | {equal / len(names):.0%} |")
    lines += ["", *(f"[{number}] {reason}" + "  " for number, reason in enumerate(reasons, 1)), ""]
    return "\n".join(lines)


def _is_equal(outcome: dict) -> bool:
    return "proof" in outcome and Proof.from_json(outcome["proof"]).status == "equal"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--only", action="append", choices=list(ZOO), help="a model; may be given several times"
    )
    parser.add_argument("--work", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        try:
            work(*arguments.work)
        except PacelineError as error:
            raise SystemExit(f"{type(error).__name__}: {error}") from error
        return
    names = arguments.only or list(ZOO)
    begin_s = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        found = run(names, Path(directory))
    text = page(names, found, (time.monotonic() - begin_s) / 60)
    print(text)
    if not arguments.only:
        PAGE.write_text(text)


if __name__ == "__main__":
    main()
