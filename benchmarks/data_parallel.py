"""Data parallelism against its alternatives: the four example jobs, by turns.

    python benchmarks/data_parallel.py --out docs/data_parallel_table.md     # all jobs: about a quarter of an hour
    python benchmarks/data_parallel.py --jobs text --rounds 30

For each job `paceline train` first chooses a layout by itself. Then four programs are started: one worker × one
thread, one worker × all threads, the chosen layout, and a plain DistributedDataParallel script under torchrun
with one process per core (`ddp_script.py`). They train on the job's real data, model, batch size and optimizer,
and take turns of about a second and a half: a round is one turn of each. The ways are compared within a
round, as the machine's speed may drift between rounds; evaluation and showcase are left out.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median, quantiles

from turns import Table

ROOT = Path(__file__).parents[1]
JOBS = ("text", "image", "speech", "driving")
OURS = "paceline's choice"
SINGLE, THREADED, DDP = "one worker × 1 thread", "one worker × all threads", "DDP script"
WAYS = (SINGLE, THREADED, OURS, DDP)
TURN_S = 1.5
WARM_UP_STEPS = 8

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
    layouts = {
        SINGLE: (1, "dp_replicate=1,threads=1"),
        THREADED: (1, f"dp_replicate=1,threads={num_cores()}"),
        OURS: (chosen["workers"], f"dp_replicate={chosen['workers']},threads={chosen['threads']}"),
    }
    step_s: dict[str, list[float]] = {way: [] for way in WAYS}
    with contextlib.ExitStack() as stack:
        tables = {}
        for number, way in enumerate(WAYS):
            where = folder / f"{job}-{number}"
            tables[way] = Table(where)
            if way == DDP:
                command = [str(ROOT / "benchmarks" / "ddp_script.py"), str(path), str(where)]
                stack.enter_context(running(num_cores(), command, where / "log"))
            else:
                workers, layout = layouts[way]
                command = [str(ROOT / "benchmarks" / "paceline_script.py"), str(path), layout, str(where)]
                stack.enter_context(running(workers, command, where / "log"))
            stack.callback(tables[way].end)
        batch_size, steps = chosen["batch_size"], {}
        for way, table in tables.items():
            table.turn(WARM_UP_STEPS)
            steps[way] = max(1, round(TURN_S * WARM_UP_STEPS / table.turn(WARM_UP_STEPS).seconds))
        for _ in range(rounds):
            for way, table in tables.items():
                turn = table.turn(steps[way])
                step_s[way].append(turn.seconds * batch_size / turn.samples)
    return Measured(job, chosen["label"], step_s)


def choose(path: Path, out: Path) -> dict[str, object]:
    """The layout that `paceline train` takes for the job, from the events of a run of one step."""
    call([sys.executable, "-m", "paceline", "train", str(path), "--steps=1", f"--out={out}", "--quiet"])
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (plan,) = [e for e in events if e["event"] == "plan"]
    (taken,) = [e for e in events if e["event"] == "trial" and e["label"] == plan["label"]]
    (run,) = [e for e in events if e["event"] == "run"]
    return {k: taken[k] for k in ("label", "workers", "threads")} | {"batch_size": run["batch_size"]}


@contextlib.contextmanager
def running(processes: int, command: list[str], log: Path) -> Iterator[None]:
    """The command under torchrun, waited for at the end."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    # torchrun gives each of several processes one thread; a layout's own number of threads wins over that.
    with log.open("w") as output:
        process = subprocess.Popen(
            [*torchrun, f"--nproc-per-node={processes}", *command], stdout=output, stderr=subprocess.STDOUT
        )
        try:
            yield
            process.wait(timeout=120)
        finally:
            process.terminate()
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{log.read_text()}")


def call(command: list[str]) -> None:
    process = subprocess.run(command, capture_output=True, text=True, timeout=1200, check=False)
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stdout}\n{process.stderr}")


def num_cores() -> int:
    return len(os.sched_getaffinity(0))


def to_markdown(results: list[Measured]) -> str:
    rounds = len(results[0].step_s[OURS])
    lines = [
        f"Milliseconds per step: median (middle half) of {rounds} rounds, {num_cores()} cores.",
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
