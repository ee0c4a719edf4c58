"""One job in every kind of layout: the same loss curve, and what each costs.

    python benchmarks/layouts.py                     # about a quarter of an hour on two cores
    python benchmarks/layouts.py --steps 50 --rounds 5

First `paceline train` trains the text example in each layout from the same seed; the curves are drawn on top of each
other (`docs/images/layouts.png`), with their distance from the curve of one process. Then the layouts take turns with
one process, a DistributedDataParallel script and an FSDP2 script (`peer_script.py`), a second and a half each
(`turns.py`).
Writes `docs/layouts.md`.
"""

from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median

import matplotlib.pyplot as plt
import torch
from peer_table import spread
from peers import CORES, ROOT
from turns import take_turns

from paceline.load import load_job
from paceline.records import Layout

ONE = "dp_replicate=1"
CURVES = (ONE, "pp=2,micro=2", "tp=2", "dp_shard=2", "dp_replicate=2,tp=2", "pp=2,dp_shard=2,micro=2")
TIMED = (
    "dp_replicate=2",
    "dp_shard=2",
    "dp_shard=2,zero=1",
    "tp=2",
    "pp=2,micro=4",
    "pp=2,micro=4,schedule=zb-h1",
)
SINGLE, THREADED, DDP, FSDP2 = (
    "one worker × 1 thread",
    "one worker × all threads",
    "DDP script",
    "FSDP2 script",
)
JOB_FILE = """
import dataclasses
from torch.utils.data import Subset
from paceline.load import load_job

whole = load_job({path!r})

def data(split):
    dataset = whole.data(split)
    return dataset if split == "train" else Subset(dataset, range(2))

job = dataclasses.replace(whole, data=data, showcase=None, evaluate_every_steps=None, name="text")
"""
PARTS = ("compute_s", "communication_s", "optimizer_s", "data_s")


@dataclasses.dataclass
class Curve:
    """One run of `paceline train`."""

    losses: list[float]
    parts_s: dict[str, float]
    """Medians over its steps, of the first worker."""
    proof: float | None
    """The largest relative error of its proof."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="of each curve")
    parser.add_argument("--rounds", type=int, default=15, help="of turns")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        job = Path(folder) / "text.py"
        job.write_text(JOB_FILE.format(path=str(ROOT / "examples" / "text.py")))
        curves = {layout: train(job, layout, arguments.steps, Path(folder)) for layout in CURVES}
        draw(curves, ROOT / "docs" / "images" / "layouts.png")
        batch_size = load_job(str(job)).batch_size
        measured, failed = take_turns(ways_of(job), arguments.rounds, Path(folder), batch_size)
        for error in failed.values():
            raise error
    step_s = {way: found.step_s for way, found in measured.items()}
    text = to_markdown(curves, step_s)
    print(text)
    (ROOT / "docs" / "layouts.md").write_text(text)


def train(job: Path, layout: str, steps: int, folder: Path) -> Curve:
    out = folder / layout
    command = [sys.executable, "-m", "paceline", "train", str(job), f"--layout={layout}", f"--steps={steps}"]
    process = subprocess.run(
        [*command, "--precision=fp32", "--quiet", f"--out={out}"],
        capture_output=True, text=True, timeout=1200, check=False,
    )  # fmt: skip
    if process.returncode:
        sys.exit(f"{' '.join(command)}\n{process.stdout}\n{process.stderr}")
    events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
    taken = [e for e in events if e["event"] == "step"]
    proofs = [e for e in events if e["event"] == "proof"]
    worst = max((d["relative_error"] for d in proofs[0]["worst"]), default=None) if proofs else None
    print(f"{layout}: loss {taken[0]['loss']:.4f} to {taken[-1]['loss']:.4f}", flush=True)
    return Curve([e["loss"] for e in taken], {p: median(e[p] for e in taken) for p in PARTS}, worst)


def distances(curves: dict[str, Curve], layout: str) -> list[float]:
    """Relative distance of a curve from that of one process, step by step."""
    return [abs(a - b) / b for a, b in zip(curves[layout].losses, curves[ONE].losses, strict=True)]


def _first_beyond(curves: dict[str, Curve], limit: float) -> int:
    """The last step before any curve is further than `limit` from that of one process."""
    far = [
        max(together) for together in zip(*(distances(curves, c) for c in curves if c != ONE), strict=True)
    ]
    return next((step for step, distance in enumerate(far) if distance > limit), len(far))


def draw(curves: dict[str, Curve], path: Path) -> None:
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    widths = [7, 5.5, 4.2, 3, 2, 1]
    for (layout, curve), width in zip(curves.items(), widths, strict=True):
        label = "one process" if layout == ONE else layout
        (line,) = left.plot(range(1, 1 + len(curve.losses)), curve.losses, lw=width, label=label)
        if layout != ONE:
            shown = [max(d, 1e-9) for d in distances(curves, layout)]
            right.plot(range(1, 1 + len(shown)), shown, lw=1.2, color=line.get_color(), label=label)
    left.set(xlabel="step", ylabel="training loss (nats per byte)", title="Six layouts, one curve")
    right.set(xlabel="step", yscale="log", title="Relative distance from one process")
    left.legend(frameon=False)
    right.axhline(1e-5, color="grey", lw=0.8, ls=":")
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)


def ways_of(job: Path) -> dict[str, tuple[int, list[str], dict[str, str]]]:
    """What takes turns: name -> (processes, command, environment)."""
    ours, peer = (str(ROOT / "benchmarks" / f"{name}_script.py") for name in ("paceline", "peer"))
    return {
        SINGLE: (1, [ours, str(job), "dp_replicate=1,threads=1"], {}),
        THREADED: (1, [ours, str(job), f"dp_replicate=1,threads={CORES}"], {}),
        DDP: (2, [peer, "ddp", str(job)], {}),
        FSDP2: (2, [peer, "fsdp2", str(job)], {}),
        **{layout: (Layout.parse(layout).workers, [ours, str(job), layout], {}) for layout in TIMED},
    }


def to_markdown(curves: dict[str, Curve], step_s: dict[str, list[float]]) -> str:
    rounds = len(step_s[SINGLE])
    lines = [
        "# Layouts: the same curve, and what each costs",
        "",
        f"`python benchmarks/layouts.py`, {datetime.date.today()}, torch {torch.__version__}, {CORES} cores, text "
        "example.",
        "",
        "![Six loss curves on top of each other](images/layouts.png)",
        "",
        f"The first {len(curves[ONE].losses)} steps from the same seed. Distances are of the loss, relative, over all "
        "steps;",
        "the proof is of the two steps before. Times are medians of the first worker's steps, in milliseconds.",
        "",
        "| layout | last loss | largest distance | proof | computation | communication | optimizer | data |",
        "|---" * 8 + "|",
    ]
    for layout, curve in curves.items():
        cells = [f"{curve.parts_s[part] * 1e3:.1f}" for part in PARTS]
        far = "–" if layout == ONE else f"{max(distances(curves, layout)):.1e}"
        proof = "–" if curve.proof is None else f"{curve.proof:.1e}"
        name = "one process" if layout == ONE else layout
        lines.append(f"| {name} | {curve.losses[-1]:.4f} | {far} | {proof} | " + " | ".join(cells) + " |")
    lines += [
        "",
        f"Step times by turns: median (middle half) of {rounds} rounds, and how many times as long as the FSDP2 "
        "script's.",
        "",
        "| way | milliseconds per step | against FSDP2 |",
        "|---|---|---|",
    ]
    for way, found in step_s.items():
        ratios = [ours / theirs for ours, theirs in zip(found, step_s[FSDP2], strict=True)]
        lines.append(f"| {way} | {spread([s * 1e3 for s in found], 1)} | {spread(ratios, 2)} |")
    lines += [
        "",
        f"Up to step {_first_beyond(curves, 1e-5)} no distance is above 1e-5; from there they grow as rounding does: "
        "gradients agree to 1e-6, and",
        "each update carries that on.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
