"""The same training under paceline and under its peers, by turns.

    pip install -c constraints.txt -e '.[examples,peers]'      # DS_BUILD_OPS=0 in the environment, for DeepSpeed
    python benchmarks/peers.py --out peers.md                  # all jobs: hours
    python benchmarks/peers.py --jobs text conv --programs ddp jax bound --sets 6
    python benchmarks/peers.py --jobs text --also tp=2 dp_shard=2

Jobs: five of `peer_jobs.py` on random data, and the four examples on their real data. Each is trained by a plain
loop in one process with one thread and with all, by each peer on all cores (`peer_script.py`, `peer_jax.py`), and
by paceline in the layout that `paceline train` takes by itself just before. All begin with the same weights and
take the same global batches in the same order, in fp32, with the job's optimizer and clipping; the losses of the
first five steps, dropout off, are compared with those of the one process (1e-4). Where batch statistics stay on
each worker, the training is another, and marked so. An example's schedule becomes a constant share of its learning
rate (LR_SHARES), as a schedule wants to know an end, and the data are cut to whole batches.

A round is one turn of each program, a second and a half, in rotating order; programs are compared within a round,
as the machine's speed drifts. Processes of one program differ by a few percent, for as long as they live: so all
programs are started anew several times (--sets), and the spread is over the rounds of all. Where not all fit the memory
together, they are measured in groups, and paceline's choice in each of them. `compute bound` are as many processes as
cores, each training alone on its share of each batch: the same computation and no communication. Peak memory is of the
worker that held most, pages that several processes map shared out among them; JAX has both devices in one process, and
torch in it for the data.

A peer that is not installed is named in the table, as is one that cannot start; the latter, or unequal losses, and the
exit status is 1.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import importlib.metadata
import importlib.util
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from peer_table import JobResult, Row, largest_distance, to_markdown
from turns import TURN_S, Measured, take_turns

from paceline.load import load_job
from paceline.measure.machine import available_memory_bytes, usable_cores
from paceline.records import Layout
from paceline.train.matmul import VARIABLE

ROOT = Path(__file__).parents[1]
CORES = len(usable_cores())
OURS = "paceline's choice"
KEEP_MEMORY = {"MALLOC_TRIM_THRESHOLD_": str(2**31 - 1), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}
"""What paceline tells malloc by itself, and a user of a plain script may set in the environment."""
SHARE_OF_MEMORY = 0.7
"""Of what is available, that programs which wait together may fill."""
BARE_WORKER_BYTES, TIMES_PARAMETERS = 350 << 20, 7
"""Memory of a worker: torch; and parameters, gradients, two moments, the peer's copies, the optimizer's temporaries."""

Way = tuple[int, list[str], dict[str, str]]


@dataclasses.dataclass(frozen=True)
class Peer:
    """A program that trains any job."""

    name: str
    script: tuple[str, ...]
    """The file in this folder, and what precedes the job file among its arguments."""
    packages: tuple[str, ...] = ()
    """What must be installed for it, under their import names."""
    processes: int = CORES
    environment: Mapping[str, str] = dataclasses.field(default_factory=dict)
    local_statistics: bool = True
    """Each worker's batch norm sees its own share of the batch only."""
    compared: bool = True

    def way(self, job: Path) -> Way:
        script, *arguments = self.script
        return self.processes, [str(ROOT / "benchmarks" / script), *arguments, str(job)], {**self.environment}


ONE = "one"
SCRIPT = "peer_script.py"
PEERS = {
    ONE: Peer("one process, 1 thread", (SCRIPT, "one"), (), 1, {"OMP_NUM_THREADS": "1"}, False),
    "all": Peer("one process, all threads", (SCRIPT, "one"), (), 1, {"OMP_NUM_THREADS": str(CORES)}, False),
    "ddp": Peer("DDP", (SCRIPT, "ddp")),
    "ddp-tuned": Peer("DDP, malloc tuned", (SCRIPT, "ddp"), environment=KEEP_MEMORY),
    "fsdp2": Peer("FSDP2", (SCRIPT, "fsdp2")),
    "zero": Peer("ZeroRedundancyOptimizer", (SCRIPT, "zero")),
    "accelerate": Peer("Accelerate", (SCRIPT, "accelerate"), ("accelerate",)),
    "fabric": Peer("Lightning Fabric", (SCRIPT, "fabric"), ("lightning_fabric",)),
    "deepspeed": Peer(
        "DeepSpeed ZeRO-1", (SCRIPT, "deepspeed"), ("deepspeed",), environment={"DS_ACCELERATOR": "cpu"}
    ),
    "jax": Peer(
        f"JAX, {CORES} devices",
        ("peer_jax.py",),
        ("jax", "optax"),
        1,
        {"XLA_FLAGS": f"--xla_force_host_platform_device_count={CORES}", "JAX_PLATFORMS": "cpu"},
        False,
    ),
    "bound": Peer("compute bound", (SCRIPT, "bound"), compared=False),
    "bound-onednn": Peer(
        "compute bound, oneDNN", (SCRIPT, "bound"), environment={VARIABLE: "onednn"}, compared=False
    ),
}

JOBS: dict[str, tuple[str, dict[str, str]]] = {
    **{
        model: ("benchmarks/peer_jobs.py", {"model": model})
        for model in ("gpt-small", "gpt-30m", "conv", "mlp-tiny", "mlp-wide")
    },
    "text": ("examples/text.py", {}),
    "image": ("examples/image.py", {"data": "mnist"}),
    "speech": ("examples/speech.py", {"data": "vowels"}),
    "driving": ("examples/driving.py", {"data": "carracing"}),
}
JAX_PORTS = [name for name, (file, _) in JOBS.items() if file.startswith("benchmarks/")]

LR_SHARES = {"image": 0.003}
"""Of the learning rate that a job with a schedule is trained with; a tenth by default. At a tenth, without the warm-up
that the schedule begins with, the image job's loss rises and rounding grows: a plain loop with two threads is 2e-3
away from one with one thread after four steps. At this share it is 2e-5, and a doubled gradient is 6e-2 away."""

JOB_FILE = """
import dataclasses
import torch
from torch.utils.data import Subset
from paceline.load import load_job

whole = load_job({path!r}, {settings!r})

def data(split):
    dataset = whole.data(split)
    num_samples = len(dataset) // whole.batch_size * whole.batch_size if split == "train" else 2
    return Subset(dataset, range(num_samples))

def schedule(optimizer, steps):
    return torch.optim.lr_scheduler.ConstantLR(optimizer, factor={lr_share}, total_iters=steps)

job = dataclasses.replace(
    whole, data=data, showcase=None, evaluate_every_steps=None, name={name!r},
    schedule=schedule if whole.schedule else None,
)
"""


def main() -> None:
    arguments = parse_arguments()
    heading = [
        f"`python benchmarks/peers.py`, {datetime.date.today()}, {CORES} cores; {versions()}.",
        f"Median (middle half) of the rounds of {arguments.sets} sets of processes; ratios are taken within a round.",
    ]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for name in arguments.jobs:
            results.append(measure(name, arguments, Path(folder)))
            print(to_markdown(results[-1:], heading[:0]), flush=True)
            if arguments.out:
                Path(arguments.out).write_text(to_markdown(results, heading))
    print(to_markdown(results, heading))
    bad = [
        f"{row.program} on {result.job}"
        for result in results
        for row in result.rows
        if row.wrong or row.note.startswith("failed")
    ]
    if bad:
        sys.exit(f"unequal losses, or no start: {', '.join(bad)}")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS))
    parser.add_argument(
        "--programs", nargs="+", choices=PEERS, default=list(PEERS), help=f"besides paceline and {ONE!r}"
    )
    parser.add_argument(
        "--also", nargs="+", metavar="LAYOUT", default=[], help="of paceline, besides its choice"
    )
    parser.add_argument("--rounds", type=int, default=5, help="of each set of processes")
    parser.add_argument("--sets", type=int, default=3, help="so many times all programs are started")
    parser.add_argument("--turn-s", type=float, default=TURN_S, help="seconds of a turn")
    parser.add_argument("--out", help="write the tables to this file as well, job by job")
    return parser.parse_args()


def measure(name: str, arguments: argparse.Namespace, folder: Path) -> JobResult:
    file, settings = JOBS[name]
    path = folder / f"{name}.py"
    lr_share = LR_SHARES.get(name, 0.1)
    path.write_text(JOB_FILE.format(path=str(ROOT / file), settings=settings, name=name, lr_share=lr_share))
    choice, label, matmul = choose(path, folder / f"{name}-auto")
    ours = {OURS: choice, **{f"paceline, {layout}": Layout.parse(layout) for layout in arguments.also}}
    ways = {title: paceline_way(path, layout, matmul) for title, layout in ours.items()}
    rows = {title: Row(title) for title in ways}
    peers = {PEERS[key].name: PEERS[key] for key in PEERS if key in (ONE, *arguments.programs)}
    for title, peer in peers.items():
        rows[title] = Row(title, note=why_not(peer, name))
        if not rows[title].note:
            ways[title] = peer.way(path)
    worker_bytes, has_batch_norm, batch_size = describe(path)
    reference: list[float] = []
    groups = in_groups(ways, worker_bytes)
    for number, group in enumerate(groups * arguments.sets):
        able = {title: way for title, way in group.items() if not rows[title].note.startswith("failed")}
        measured, failed = take_turns(
            able, arguments.rounds, folder / f"{name}-{number}", batch_size, arguments.turn_s
        )
        for title, error in failed.items():
            if title in (OURS, PEERS[ONE].name):
                raise error
            print(f"{title}: {error}", file=sys.stderr, flush=True)
            rows[title].note = f"failed: {error.reason}".replace("|", "/")
        reference = reference or measured[PEERS[ONE].name].losses
        for title, found in measured.items():
            fill(rows[title], found, measured[OURS], reference)
            peer = peers.get(title)
            if peer is not None and not peer.compared:
                rows[title].distance, rows[title].note = None, "not compared"
            rows[title].other_training = bool(peer and peer.local_statistics and has_batch_norm)
    return JobResult(name, label, batch_size, arguments.rounds * arguments.sets, list(rows.values()))


def fill(row: Row, found: Measured, ours: Measured, reference: list[float]) -> None:
    """Add a group's measurement: paceline's choice is in all groups, any other in one of each set."""
    row.step_s += found.step_s
    row.ratios += [theirs / own for theirs, own in zip(found.step_s, ours.step_s, strict=True)]
    row.peak_bytes = max(row.peak_bytes, *found.peak_bytes)
    row.distance = max(row.distance or 0.0, largest_distance(found.losses, reference))


def why_not(peer: Peer, job: str) -> str:
    """Why a peer cannot train the job; empty where it can."""
    if missing := [name for name in peer.packages if importlib.util.find_spec(name) is None]:
        return f"not installed: {', '.join(missing)}"
    return "not ported" if peer is PEERS["jax"] and job not in JAX_PORTS else ""


def paceline_way(job: Path, layout: Layout, matmul: str) -> Way:
    """As the command would train it; a `Session` of its own takes what the environment says of the library."""
    script = str(ROOT / "benchmarks" / "paceline_script.py")
    return layout.workers, [script, str(job), str(layout)], {VARIABLE: matmul}


def choose(path: Path, out: Path) -> tuple[Layout, str, str]:
    """The layout that `paceline train` takes for the job, its name, and the library that multiplies its matrices.

    From the events of a run of one step.
    """
    train = [sys.executable, "-m", "paceline", "train", str(path), "--steps=1", "--precision=fp32"]
    process = subprocess.run(
        [*train, f"--out={out}", "--quiet"], capture_output=True, text=True, timeout=1200, check=False
    )
    if process.returncode:
        sys.exit(f"{' '.join(train)}\n{process.stdout}\n{process.stderr}")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    (plan,) = [e for e in events if e["event"] == "plan"]
    (run,) = [e for e in events if e["event"] == "run"]
    library = f", {run['matmul']}" if run["matmul"] != "torch" else ""
    return Layout.from_json(plan["layout"]), str(plan["label"]) + library, str(run["matmul"])


def describe(path: Path) -> tuple[int, bool, int]:
    """Bytes that a worker may need, whether the model has batch norm, and the global batch size."""
    job = load_job(path)
    with torch.device("meta"):
        model = job.model()
    parameters = sum(p.numel() * p.element_size() for p in model.parameters())
    has_batch_norm = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    return BARE_WORKER_BYTES + TIMES_PARAMETERS * parameters, has_batch_norm, job.batch_size


def in_groups(ways: Mapping[str, Way], worker_bytes: int) -> list[dict[str, Way]]:
    """The ways in as few groups as fit the memory, in their order; the first is in each group.

    JAX's devices count as workers.
    """

    def size(way: Way) -> int:
        is_jax = any(argument.endswith("peer_jax.py") for argument in way[1])
        return worker_bytes * (CORES if is_jax else way[0])

    (first, own), *others = ways.items()
    room = SHARE_OF_MEMORY * available_memory_bytes("cpu") - size(own)
    groups, taken = [{first: own}], 0
    for title, way in others:
        if taken and taken + size(way) > room:
            groups.append({first: own})
            taken = 0
        groups[-1][title] = way
        taken += size(way)
    return groups


def versions() -> str:
    packages = ["torch", *(name for peer in PEERS.values() for name in peer.packages)]
    installed = [name for name in packages if importlib.util.find_spec(name)]
    return ", ".join(f"{name} {importlib.metadata.version(name.replace('_', '-'))}" for name in installed)


if __name__ == "__main__":
    main()
