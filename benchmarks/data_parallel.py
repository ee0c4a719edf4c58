"""Data parallelism against its alternatives: the four example jobs, by turns.

    python benchmarks/data_parallel.py --out table.md          # all jobs: about a quarter of an hour
    python benchmarks/data_parallel.py --jobs text --rounds 30

For each job `paceline train` first chooses a layout by itself. Then five programs are started: one worker × one
thread, one worker × all threads, the chosen layout, a plain DistributedDataParallel script under torchrun
with one process per core (`peer_script.py`), and the same script with malloc told to keep freed memory, as paceline
tells it by itself. They train on the job's real data, model, batch size and optimizer, and take turns of about a
second and a half: a round is one turn of each. The ways are compared within a round, as the machine's speed may
drift between rounds; evaluation and showcase are left out. Where one process was chosen, its ratio to the way that
is the same program shows the noise.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median, quantiles

from turns import take_turns

from paceline.measure.machine import usable_cores
from paceline.records import Layout

ROOT = Path(__file__).parents[1]
JOBS = ("text", "image", "speech", "driving")
OURS = "paceline's choice"
SINGLE, THREADED = "one worker × 1 thread", "one worker × all threads"
DDP, TUNED_DDP = "DDP script", "DDP script, malloc tuned"
WAYS = (SINGLE, THREADED, OURS, DDP, TUNED_DDP)
CORES = len(usable_cores())
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""What paceline tells malloc by itself, and a user of a plain script may set in the environment."""

JOB_FILE = """
import dataclasses
from torch.utils.data import Subset
from paceline.load import load_job

whole = load_job({path!r})

def data(split):
    dataset = whole.data(split)
    return dataset if split == "train" else Subset(dataset, range(2))

job = dataclasses.replace(whole, data=data, showcase=None, evaluate_every_steps=None, name={name!r})
"""


@dataclasses.dataclass
class Measured:
    """One job: what was chosen, and the seconds per global batch of each way, round by round."""

    job: str
    choice: str
    step_s: dict[str, list[float]]

    def ratios(self, way: str) -> list[float]:
        """How many times as long as paceline's choice the way takes, round by round."""
        return [theirs / ours for theirs, ours in zip(self.step_s[way], self.step_s[OURS], strict=True)]


def main() -> None:
    arguments = parse_arguments()
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for job in arguments.jobs:
            results.append(measure(job, arguments.rounds, Path(folder)))
            print(to_markdown(results[-1:]), flush=True)
    table = to_markdown(results)
    print(table)
    if arguments.out:
        Path(arguments.out).write_text(table)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--out", help="write the table to this file as well")
    return parser.parse_args()


def measure(job: str, rounds: int, folder: Path) -> Measured:
    path = folder / f"{job}.py"
    path.write_text(JOB_FILE.format(path=str(ROOT / "examples" / f"{job}.py"), name=job))
    chosen = choose(path, folder / f"{job}-auto")
    workers, batch_size = int(chosen["workers"]), int(chosen["batch_size"])
    ours, ddp = str(ROOT / "benchmarks" / "paceline_script.py"), str(ROOT / "benchmarks" / "peer_script.py")
    ways: dict[str, tuple[int, list[str], dict[str, str]]] = {
        SINGLE: (1, [ours, str(path), "dp_replicate=1,threads=1"], {}),
        THREADED: (1, [ours, str(path), f"dp_replicate=1,threads={CORES}"], {}),
        OURS: (workers, [ours, str(path), str(chosen["layout"])], {}),
        DDP: (CORES, [ddp, "ddp", str(path)], {}),
        TUNED_DDP: (CORES, [ddp, "ddp", str(path)], KEEP_MEMORY),
    }
    step_s = take_turns(ways, rounds, folder / job, batch_size)
    return Measured(job, str(chosen["label"]), step_s)


def choose(path: Path, out: Path) -> dict[str, str | int]:
    """The layout that `paceline train` takes for the job, from the events of a run of one step."""
    train = [sys.executable, "-m", "paceline", "train", str(path), "--steps=1", "--precision=fp32"]
    process = subprocess.run(
        [*train, f"--out={out}", "--quiet"], capture_output=True, text=True, timeout=1200, check=False
    )
    if process.returncode:
        sys.exit(f"{' '.join(train)}\n{process.stdout}\n{process.stderr}")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (plan,) = [e for e in events if e["event"] == "plan"]
    (run,) = [e for e in events if e["event"] == "run"]
    layout = Layout.from_json(plan["layout"])
    return {
        "label": plan["label"],
        "layout": str(layout),
        "workers": layout.workers,
        "batch_size": run["batch_size"],
    }


def to_markdown(results: list[Measured]) -> str:
    rounds = len(results[0].step_s[OURS])
    lines = [
        f"Milliseconds per step: median (middle half) of {rounds} rounds, {CORES} cores.",
        "",
        "| job | " + " | ".join(WAYS) + " | chosen |",
        "|---" * (len(WAYS) + 2) + "|",
    ]
    for measured in results:
        cells = [spread([s * 1e3 for s in measured.step_s[way]], 1) for way in WAYS]
        lines.append(f"| {measured.job} | " + " | ".join(cells) + f" | {measured.choice} |")
    others = [way for way in WAYS if way != OURS]
    lines += [
        "",
        "How many times as fast paceline's choice is: median (middle half) of the ratios within a round.",
        "",
        "| job | " + " | ".join(others) + " |",
        "|---" * (len(others) + 1) + "|",
    ]
    for measured in results:
        cells = [spread(measured.ratios(way), 2) for way in others]
        lines.append(f"| {measured.job} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float], digits: int) -> str:
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


if __name__ == "__main__":
    main()
