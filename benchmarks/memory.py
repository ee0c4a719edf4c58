"""What each worker holds of a 110 M-parameter transformer, layout by layout; and training under a memory limit.

    python benchmarks/memory.py              # about ten minutes; the limit needs root and cgroup v1
    python benchmarks/memory.py --no-limit

A worker's memory is what is private to it (smaps: Anonymous; not what workers share to exchange tensors), less what
it was before the model was built: the framework. *State* is taken just before the second update, when parameters,
gradients and the optimizer's state are all there and activations are not. *Peak* is the largest of samples every 10 ms
during the steps; *building* before them.
Writes `docs/memory.md`.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from paceline.load import load_job_file
from paceline.records import Layout

ROOT = Path(__file__).parents[1]
JOB = ROOT / "benchmarks" / "memory_job.py"
LAYOUTS = (
    "dp_replicate=1", "recompute=full", "dp_shard=2", "dp_shard=4", "dp_shard=4,zero=1", "tp=2", "tp=4",
    "tp=4,sequence=on", "pp=2,micro=4", "pp=4,micro=8", "dp_shard=2,tp=2", "dp_shard=4,recompute=full",
)  # fmt: skip
LIMITED = ("dp_replicate=1", "dp_shard=4", "pp=4,micro=4", "tp=4")
LIMIT_BYTES = 1000 << 20
MIB = 1 << 20


def private_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Anonymous:"):
            return int(line.split()[1]) * 1024
    return 0


class Sampler(threading.Thread):
    """The largest private memory of this process since it was last asked."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.start()

    def run(self) -> None:
        while True:
            self.peak = max(self.peak, private_bytes())
            time.sleep(0.01)

    def take(self) -> int:
        peak, self.peak = max(self.peak, private_bytes()), 0
        return peak


def work(layout: str, out: Path) -> None:
    """One worker: train three steps, tell what was held."""
    from paceline.train.session import Session

    os.environ["MALLOC_TRIM_THRESHOLD_"] = "131072"  # freed memory is to be seen as freed
    trim = ctypes.CDLL(None).malloc_trim
    job = load_job_file(str(JOB), {}).job
    rank = int(os.environ.get("RANK", 0))
    x = torch.randn(256, 256, requires_grad=True)
    (x @ x).sum().backward()  # what the framework takes at first use
    base, sampler, states = private_bytes(), Sampler(), []
    with Session(job, layout) as session:
        building = sampler.take() - base

        def before_update(*_: object) -> None:
            trim(0)
            states.append(private_bytes() - base)

        session.optimizer.register_step_pre_hook(before_update)
        trim(0)
        sampler.take()
        peaks = []
        for batch in session.batches(steps=3):
            session.step(batch)
            peaks.append(sampler.take() - base)
        session.group.barrier("the end")
    (out / f"{rank}.json").write_text(
        json.dumps({"building": building, "state": states[1], "peak": max(peaks[1:]), "base": base})
    )


def measure(layout: str) -> dict[str, int]:
    """The largest of all workers, in bytes."""
    workers = Layout.parse(layout).workers
    with tempfile.TemporaryDirectory() as directory:
        command = [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            f"--nproc-per-node={workers}",
        ]
        process = subprocess.run(
            [*command, __file__, "--work", layout, directory],
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
        if process.returncode:
            sys.exit(process.stderr[-4000:])
        found = [json.loads(path.read_text()) for path in Path(directory).glob("*.json")]
    assert len(found) == workers
    return {key: max(f[key] for f in found) for key in found[0]}


@contextlib.contextmanager
def memory_limit(name: str, workers: int, limit_bytes: int) -> Iterator[None]:
    """A cgroup for each worker; gone afterwards."""
    directories = [Path(f"/sys/fs/cgroup/memory/{name}-{rank}") for rank in range(workers)]
    try:
        for directory in directories:
            directory.mkdir()
            (directory / "memory.limit_in_bytes").write_text(str(limit_bytes))
        yield
    finally:
        for directory in directories:
            with contextlib.suppress(OSError):
                directory.rmdir()


def train_limited(layout: str) -> str:
    """`paceline train` with a limit for each worker: what came of it."""
    name = f"paceline-{os.getpid()}"
    workers = Layout.parse(layout).workers
    with memory_limit(name, workers, LIMIT_BYTES), tempfile.TemporaryDirectory() as directory:
        process = subprocess.run(
            [sys.executable, "-m", "paceline", "train", str(JOB), f"--layout={layout}", "--quiet", "--precision=fp32",
             f"--out={directory}/run"],
            env={**os.environ, "PACELINE_CGROUP": name}, capture_output=True, text=True, timeout=900, check=False,
        )  # fmt: skip
        if process.returncode:
            return process.stderr.strip().splitlines()[0]
        events = [
            json.loads(line) for line in Path(directory, "run", "events.jsonl").read_text().splitlines()
        ]
    losses = [e["loss"] for e in events if e["event"] == "step"]
    return f"trained: loss {losses[0]:.4f}, {losses[1]:.4f}, {losses[2]:.4f}"


def to_markdown(found: dict[str, dict[str, int]], limited: dict[str, str]) -> str:
    whole = found["dp_replicate=1"]["state"]
    parameters = sum(p.numel() for p in load_job_file(str(JOB), {}).job.model().parameters())
    lines = [
        "# Memory of each worker",
        "",
        f"`python benchmarks/memory.py`, {datetime.date.today()}, torch {torch.__version__}: a transformer of "
        f"{parameters / 1e6:.0f} M parameters in float32,",
        "AdamW, global batch of 8 sequences of 64 tokens. MiB of private memory of the largest worker, less the",
        f"framework ({found['dp_replicate=1']['base'] / MIB:.0f} MiB). *State*: parameters, gradients and the",
        "optimizer's state, just before an update. *Peak*: during steps. *Building*: before the first.",
        "",
        "| layout | state | of one process | peak | building |",
        "|---|---|---|---|---|",
    ]
    for layout, f in found.items():
        name = "one process" if layout == "dp_replicate=1" else layout
        lines.append(
            f"| {name} | {f['state'] / MIB:.0f} | {f['state'] / whole:.3f} | {f['peak'] / MIB:.0f} | "
            f"{f['building'] / MIB:.0f} |"
        )
    if limited:
        lines += [
            "",
            f"## {LIMIT_BYTES / MIB:.0f} MiB for each worker",
            "",
            "The same job under a cgroup's memory limit for each worker, framework included:",
            "",
            "| layout | what came of `paceline train benchmarks/memory_job.py --layout …` |",
            "|---|---|",
            *(f"| {layout} | {result} |" for layout, result in limited.items()),
        ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--no-limit", action="store_true", help="leave the cgroups out")
    parser.add_argument("--work", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work[0], Path(arguments.work[1]))
        return
    found = {}
    for layout in LAYOUTS:
        found[layout] = measure(layout)
        print(layout, {key: f"{value / MIB:.0f} MiB" for key, value in found[layout].items()}, flush=True)
    limited = {}
    if not arguments.no_limit:
        for layout in LIMITED:
            limited[layout] = train_limited(layout)
            print(layout, limited[layout], flush=True)
    text = to_markdown(found, limited)
    (ROOT / "docs" / "memory.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
