"""Data parallelism against its alternatives: the four example jobs, in interleaved rounds.

    python benchmarks/data_parallel.py                      # all jobs, three rounds; writes docs/data_parallel.md
    python benchmarks/data_parallel.py --jobs text --rounds 5

Each round runs every job in every way, one after the other: one worker × one thread, one worker × all
threads, the layout that `paceline train` chooses by itself, and a plain DistributedDataParallel script under
torchrun with one process per core (`ddp_script.py`). All are whole processes on the job's real data, model,
batch size and optimizer; evaluation and showcase are left out. The figure is the mean time of a step after
the first ones. The ways are compared within a round: the machine's speed may drift between rounds.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import mean, median

ROOT = Path(__file__).parents[1]
WARM_UP_STEPS = 10
STEPS = {"text": 90, "image": 90, "speech": 600, "driving": 120}
SETTINGS: dict[str, dict[str, str]] = {name: {} for name in STEPS}
WAYS = ("one worker × 1 thread", "one worker × all threads", "paceline's choice", "DDP script")

JOB_FILE = """
import dataclasses
from torch.utils.data import Subset
from paceline.load import load_job

whole = load_job({path!r}, {settings!r})

def data(split):
    dataset = whole.data(split)
    return dataset if split == "train" else Subset(dataset, range(2))

job = dataclasses.replace(whole, data=data, showcase=None, evaluate_every_steps=None, name={name!r})
"""


@dataclasses.dataclass
class Measured:
    """One run: mean seconds per step, the layout that was trained, and the median of the last losses."""

    step_s: float
    layout: str
    loss: float


def main() -> None:
    arguments = parse_arguments()
    results: dict[str, dict[str, list[Measured]]] = {job: {way: [] for way in WAYS} for job in arguments.jobs}
    with tempfile.TemporaryDirectory() as folder:
        for number in range(arguments.rounds):
            for job in arguments.jobs:
                for way in WAYS:
                    where = Path(folder) / f"{number}-{job}-{WAYS.index(way)}"
                    where.mkdir()
                    measured = run(job, way, where)
                    results[job][way].append(measured)
                    print(
                        f"round {number + 1}  {job:8} {way:25} {measured.step_s * 1e3:8.1f} ms  "
                        f"loss {measured.loss:.4f}  {measured.layout}",
                        flush=True,
                    )
    table = to_markdown(results, arguments.rounds)
    print(table)
    if arguments.out:
        Path(arguments.out).write_text(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", help="write the table to this file as well")
    return parser.parse_args()


def run(job: str, way: str, where: Path) -> Measured:
    """One whole run of `job` in one way, in processes of its own."""
    path = where / f"{job}.py"
    text = JOB_FILE.format(path=str(ROOT / "examples" / f"{job}.py"), settings=SETTINGS[job], name=job)
    path.write_text(text)
    if way == "DDP script":
        return run_ddp(path, STEPS[job], where)
    layouts = {
        "one worker × 1 thread": "dp_replicate=1,threads=1",
        "one worker × all threads": f"dp_replicate=1,threads={num_cores()}",
        "paceline's choice": "auto",
    }
    out = where / "run"
    paceline = [sys.executable, "-m", "paceline", "train", str(path)]
    call([*paceline, f"--layout={layouts[way]}", f"--steps={STEPS[job]}", f"--out={out}", "--quiet"])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    steps = [e for e in events if e["event"] == "step"]
    (batch_size,) = [e["batch_size"] for e in events if e["event"] == "run"]
    (label,) = [e["label"] for e in events if e["event"] == "plan"]
    counted = steps[WARM_UP_STEPS:]
    seconds = sum(e["step_s"] for e in counted) * batch_size / sum(e["samples"] for e in counted)
    return Measured(seconds, label, median(e["loss"] for e in steps[-20:]))


def run_ddp(path: Path, steps: int, where: Path) -> Measured:
    out = where / "ddp.json"
    script = str(ROOT / "benchmarks" / "ddp_script.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    call([*torchrun, f"--nproc-per-node={num_cores()}", script, str(path), str(steps), str(out)])
    found = json.loads(out.read_text())
    label = f"{num_cores()} processes × 1 thread"
    return Measured(mean(found["step_s"][WARM_UP_STEPS:]), label, median(found["losses"][-20:]))


def call(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stdout}\n{process.stderr}")


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def to_markdown(results: dict[str, dict[str, list[Measured]]], rounds: int) -> str:
    lines = [
        f"Milliseconds per step: median (min – max) of {rounds} interleaved rounds, {num_cores()} cores.",
        "",
        "| job | " + " | ".join(WAYS) + " | chosen |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for job, ways in results.items():
        cells = []
        for way in WAYS:
            times = [m.step_s * 1e3 for m in ways[way]]
            cells.append(f"{median(times):.1f} ({min(times):.1f} – {max(times):.1f})")
        chosen = ", ".join(sorted({m.layout for m in ways["paceline's choice"]}))
        lines.append(f"| {job} | " + " | ".join(cells) + f" | {chosen} |")
    lines += [
        "",
        "How many times as fast paceline's choice is: median (min – max) of the ratios within a round.",
        "",
        "| job | " + " | ".join(way for way in WAYS if way != "paceline's choice") + " |",
        "|---" * len(WAYS) + "|",
    ]
    for job, ways in results.items():
        cells = []
        for way in (w for w in WAYS if w != "paceline's choice"):
            ratios = [
                theirs.step_s / ours.step_s
                for theirs, ours in zip(ways[way], ways["paceline's choice"], strict=True)
            ]
            cells.append(f"{median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})")
        lines.append(f"| {job} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
