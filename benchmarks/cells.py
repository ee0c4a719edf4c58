"""Forecasts of many layouts held against their measurement: a job on a cluster is a pair, a layout of it a cell.

`forecast.py`, `regret.py` and `knee.py` make their tables of pairs. Each pair is measured by processes of its own
(cell_worker.py) and kept in a file of its own, JOB@CLUSTER.json: a long run goes on where it was interrupted, and the
tables are made again from the files.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from box_processes import Ended, Start
from cell_clusters import CLUSTERS
from peers import JOBS as PEER_JOBS

from paceline.errors import PacelineError
from paceline.plan.profile import LinkedCluster, Profile

HELD_OUT = ("latents", "experts", "fourier", "retention", "squeeze", "splines")
_HELD_OUT_BEFORE = (
    "vit",
    "lstm",
    "unet",
    "mixer",
    "autoencoder",
    "sets",
    "tcn",
    "tables",
    "graph",
    "seq2seq",
    "resnet",
    "towers",
    "mobile",
    "dense",
    "pyramid",
)
WAITING = {
    f"waiting-{model}": ("benchmarks/waiting_jobs.py", {"model": model}) for model in ("mlp", "gpt", "conv")
}
JOBS = {
    **PEER_JOBS,
    **{model: ("benchmarks/held_out_jobs.py", {"model": model}) for model in _HELD_OUT_BEFORE},
    **{model: ("benchmarks/unseen_jobs.py", {"model": model}) for model in HELD_OUT},
    **WAITING,
}
"""By name, the file and its options."""
TUNED_ON = (
    "text",
    "image",
    "conv",
    "mlp-wide",
    "gpt-small",
    "driving",
    "speech",
    "mlp-tiny",
    *_HELD_OUT_BEFORE,
)
"""Jobs with whose cells in sight the model of cost was corrected; nothing is changed after others were measured."""
PAUSE_S = 0.025
"""A worker with less than a core pauses for up to so long: the median of shorter steps does not see it."""
LIMIT_S = 600.0
PROGRESS = "» "
"""Before what a worker says of its progress."""
_WORKER = Path(__file__).with_name("cell_worker.py")
_LAST_LINES = 8


@dataclasses.dataclass
class Cell:
    """One layout of one job on one cluster."""

    job: str
    cluster: str
    layout: str
    forecast_s: float | None = None
    """None: the planner has no forecast of it."""
    error_s: float | None = None
    """The forecast's error bar."""
    terms: dict[str, float] = dataclasses.field(default_factory=dict)
    was_tried: bool = False
    """While the job was measured this layout was timed for a moment: its forecast is no forecast."""
    round_s: list[float] = dataclasses.field(default_factory=list)
    """Of each round the mean step."""
    median_step_s: float | None = None
    """Of all timed steps."""
    trouble: str = ""
    """Why it was not measured, or has no forecast."""

    @property
    def measured_s(self) -> float | None:
        """The median step; where hosts pause for longer than a step takes, the median round's mean step."""
        if not self.round_s:
            return None
        of_rounds = median(self.round_s)
        pauses = CLUSTERS[self.cluster].has_pauses and of_rounds < PAUSE_S
        return of_rounds if pauses or self.median_step_s is None else self.median_step_s

    @property
    def off(self) -> float | None:
        """Relative error of the forecast."""
        measured_s = self.measured_s
        return None if measured_s is None or self.forecast_s is None else self.forecast_s / measured_s - 1

    @property
    def noise(self) -> float:
        """A/A: relative distance of the medians of every other round."""
        first, second = self.round_s[::2], self.round_s[1::2]
        return abs(median(first) / median(second) - 1) if second else 0.0

    @property
    def is_inside(self) -> bool:
        """The measured step lies within the forecast's error bar."""
        measured_s = self.measured_s
        if measured_s is None or self.forecast_s is None or self.error_s is None:
            return False
        return abs(measured_s - self.forecast_s) <= self.error_s


@dataclasses.dataclass
class Pair:
    """A job on a cluster: what was forecast and measured of it."""

    job: str
    cluster: str
    date: str = ""
    torch: str = ""
    rounds: int = 0
    batch_size: int = 0
    cells: list[Cell] = dataclasses.field(default_factory=list)
    choice: str = ""
    """The layout that the planner takes by forecast alone, of all that it knows."""
    rules: dict[str, str] = dataclasses.field(default_factory=dict)
    """What each rule of thumb takes."""
    curve: list[tuple[int, str, float]] = dataclasses.field(default_factory=list)
    """For each number of workers the fastest layout by forecast, and its step in seconds."""
    profile: dict[str, Any] = dataclasses.field(default_factory=dict)
    linked: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    """What measuring the job, and timing its layouts, took."""
    failure: str = ""
    """Why the pair did not come to its end; cells that were measured before are there."""
    again: list[Cell] = dataclasses.field(default_factory=list)
    """Those that may be the fastest, and the planner's choice, timed once more by themselves."""

    @property
    def name(self) -> str:
        return pair_name(self.job, self.cluster)

    @property
    def timed(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.round_s]

    @property
    def timed_again(self) -> dict[str, Cell]:
        """By layout."""
        return {cell.layout: cell for cell in self.again if cell.round_s}

    def cell(self, layout: str) -> Cell | None:
        """The measured cell of a layout."""
        return next((cell for cell in self.timed if cell.layout == layout), None)

    def known(self) -> tuple[Profile, LinkedCluster]:
        return Profile.from_json(self.profile), LinkedCluster.from_json(self.linked)

    def write(self, path: Path) -> None:
        """All of it or nothing is there afterwards."""
        partial = path.with_suffix(".writing")
        partial.write_text(json.dumps(dataclasses.asdict(self), indent=1) + "\n")
        os.replace(partial, path)

    @classmethod
    def read(cls, path: Path) -> Pair:
        data = json.loads(path.read_text())
        cells = [Cell(**cell) for cell in data.pop("cells")]
        again = [Cell(**cell) for cell in data.pop("again", ())]
        curve = [(workers, layout, step_s) for workers, layout, step_s in data.pop("curve")]
        return cls(cells=cells, again=again, curve=curve, **data)


def pair_name(job: str, cluster: str) -> str:
    return f"{job}@{cluster}"


def with_measuring(parser: argparse.ArgumentParser, clusters: Iterable[str]) -> None:
    """Options of every program that measures pairs."""
    names = list(clusters)
    parser.add_argument("--jobs", nargs="+", choices=JOBS, metavar="JOB", help=f"of {', '.join(JOBS)}")
    parser.add_argument("--boxes", nargs="+", choices=names, metavar="CLUSTER", help=f"of {', '.join(names)}")
    parser.add_argument(
        "--results", type=Path, metavar="DIR", help="keep a file for each pair; go on from these"
    )
    parser.add_argument(
        "--from", dest="kept", type=Path, metavar="DIR", help="measure nothing: tables of these files"
    )
    parser.add_argument("--retry", action="store_true", help="measure pairs again that have failed")
    parser.add_argument(
        "--rounds", type=int, default=12, help="of each layout (default 12); slow ones have 2"
    )
    parser.add_argument(
        "--timing", type=float, default=60.0, metavar="S", help="about what the rounds of a pair take"
    )
    parser.add_argument(
        "--limit", type=float, default=LIMIT_S, metavar="S", help="of a pair; then it has failed"
    )
    parser.add_argument("--out", type=Path, help="write the tables to this file as well")


def measured_pairs(wanted: Sequence[tuple[str, str]], options: argparse.Namespace) -> list[Pair]:
    """The pairs, measured now or read from their files, in this order. Those that `--from` lacks are left out."""
    if options.kept is not None:
        paths = [options.kept / f"{pair_name(*pair)}.json" for pair in wanted]
        found = [Pair.read(path) for path in paths if path.exists()]
        if not found:
            sys.exit(f"{options.kept} has none of {', '.join(pair_name(*pair) for pair in wanted)}")
        return found
    # As by Ctrl-C: boxes are taken down, and what they run is ended.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.results or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return [
            _measured(job, cluster, folder, options, f"{number} of {len(wanted)}")
            for number, (job, cluster) in enumerate(wanted, 1)
        ]


def _measured(job: str, cluster: str, folder: Path, options: argparse.Namespace, which: str) -> Pair:
    path = folder / f"{pair_name(job, cluster)}.json"
    if path.exists():
        pair = Pair.read(path)
        if not (pair.failure and options.retry):
            _say(f"{which}: {pair.name} is in {path}")
            return pair
    _say(f"{which}: {job} on {cluster} ({CLUSTERS[cluster].describe()})")
    begin_s = time.monotonic()
    partial = path.with_suffix(".part")
    partial.unlink(missing_ok=True)
    task = {
        "job": job,
        "cluster": cluster,
        "rounds": options.rounds,
        "timing_s": options.timing,
        "limit_s": options.limit,
        "out": str(partial),
    }
    try:
        command = [sys.executable, str(_WORKER), json.dumps(task)]
        failure = _what_failed(CLUSTERS[cluster].start(command, options.limit, _tell))
    except PacelineError as error:
        failure = str(error)
    pair = Pair.read(partial) if partial.exists() else Pair(job, cluster)
    pair.failure = failure
    pair.write(path)
    partial.unlink(missing_ok=True)
    took_s = time.monotonic() - begin_s
    _say(f"{pair.name}: {len(pair.timed)} layouts in {took_s:.0f} s{': ' * bool(failure)}{failure}")
    return pair


def _what_failed(ended: Sequence[Ended]) -> str:
    """In a line: the first worker that failed by itself, and the last that it said."""
    failed = [end for end in ended if end.failure]
    if not failed:
        return ""
    # Others feel that one is gone, and are ended.
    said = [line for end in failed for line in end.stderr.strip().splitlines()[-_LAST_LINES:]]
    last = [line for line in said if not line.startswith(PROGRESS)]
    print("\n".join(last), file=sys.stderr, flush=True)
    first = failed[0]
    cause = next((line for line in reversed(last) if "Error" in line), "")
    return f"a worker of host {first.host} {first.failure}" + (f": {cause}" if cause else "")


def _tell(start: Start, line: str, is_error: bool) -> None:
    if line.startswith(PROGRESS):
        _say(f"    {line.removeprefix(PROGRESS)}")


def _say(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def heading(program: str, pairs: Sequence[Pair]) -> str:
    """Where and when it was measured."""
    dates = sorted({pair.date for pair in pairs if pair.date})
    when = " to ".join(dict.fromkeys((dates[0], dates[-1]))) if dates else "nothing measured"
    versions = ", ".join(sorted({pair.torch for pair in pairs if pair.torch}) or [torch.__version__])
    rounds = ", ".join(sorted({str(pair.rounds) for pair in pairs if pair.rounds}))
    return f"`python benchmarks/{program}`, {when}, torch {versions}, {rounds} rounds."


def failures(pairs: Sequence[Pair]) -> list[str]:
    """Lines of a table of what could not be measured; none where nothing failed."""
    rows = [f"| {pair.job} | {pair.cluster} | all | {pair.failure} |" for pair in pairs if pair.failure]
    rows += [
        f"| {cell.job} | {cell.cluster} | {cell.layout} | {cell.trouble} |"
        for pair in pairs
        for cell in pair.cells
        if cell.trouble
    ]
    return (
        [*head("job", "cluster", "layout", "why it was not measured or not forecast"), *rows] if rows else []
    )


def head(*columns: str) -> list[str]:
    """Of a table."""
    return [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def finish(text: str, out: Path | None) -> None:
    print(text)
    if out is not None:
        out.write_text(text)


def ms(seconds: float | None) -> str:
    return "–" if seconds is None else f"{seconds * 1e3:.2f}"


def percent(share: float | None, sign: str = "") -> str:
    return "–" if share is None or math.isnan(share) else f"{share:{sign}.1%}"
