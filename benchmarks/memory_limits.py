"""Layouts under memory limits: is anything killed that a plan accepts, or refused that would have run?

    python benchmarks/memory_limits.py DIR           # jobs that memory_forecast.py has measured in DIR; root, box.py
    python benchmarks/memory_limits.py DIR --table   # the table again

Layouts run in hosts of a box whose memory is some times what the plan wants for them. A plan leaves a share free, its
margin, so it wants the forecast of all workers of the host over the rest. Where the host has more than that the plan
accepts the layout, and the kernel must not kill it. Where it has less the plan refuses it; the layout then runs in a
host without the margin, and if it survives there it was refused without need. What counts against the limit is
what workers hold once: `Forecaster.needed_bytes`.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import tempfile
from collections.abc import Sequence
from pathlib import Path

from box import Box, BoxHost
from memory_forecast import (
    CORES,
    MIB,
    STEPS,
    TIMEOUT_S,
    command_of,
    keep,
    kept,
    spec_of,
)

from paceline.errors import LayoutError
from paceline.plan.forecast import Forecaster
from paceline.plan.kept import read_kept
from paceline.plan.room import memory_margin
from paceline.records import Layout

LIMITED = ("dp_replicate=1,threads=1", f"dp_replicate={CORES},threads=1", f"dp_shard={CORES},zero=3,threads=1",
           f"tp={CORES},threads=1", f"pp={CORES},micro={2 * CORES},threads=1")  # fmt: skip
TIMES = (0.8, 0.95, 1.02, 1.2)
"""A host's memory over what a plan wants."""


@dataclasses.dataclass
class Limited:
    """One layout of one job, run in a host of so much memory."""

    job: str
    layout: str
    times: float
    """The host's memory over what the plan wants."""
    forecast_bytes: int
    """Of all workers together."""
    limit_bytes: int
    """Under which it ran: the host's memory, or of what is refused without the plan's margin."""
    accepted: bool
    survived: bool
    error: str = ""


def run_limited(jobs: Sequence[str], directory: Path) -> None:
    """Run what `directory` does not hold yet under limits."""
    file = directory / "limits.jsonl"
    done = {(cell["job"], cell["layout"], cell["times"]) for cell in kept(file)}
    for job in jobs:
        profile, linked = read_kept(directory / job)
        assert linked is not None
        forecaster = Forecaster(profile, linked)
        for text in LIMITED:
            layout = Layout.parse(text)
            with contextlib.suppress(LayoutError):
                forecaster.check(layout)
                needed = layout.workers * forecaster.needed_bytes(layout)
                for times in TIMES:
                    if (job, text, times) not in done:
                        keep(file, train_limited(job, layout, times, needed, memory_margin(linked)))


def train_limited(job: str, layout: Layout, times: float, needed_bytes: int, margin: float) -> Limited:
    """Train in a host whose memory is `times` what a plan wants, or, where that refuses the layout, in what it uses."""
    host_bytes = int(times * needed_bytes / (1 - margin))
    accepted = times >= 1
    limit_bytes = host_bytes if accepted else int(host_bytes * (1 - margin))
    with tempfile.TemporaryDirectory() as place:
        spec = spec_of(job, Path(place), layout=str(layout), steps=STEPS, verify=False)
        with Box([BoxHost(memory_bytes=limit_bytes, workers=layout.workers)]) as box:
            ended = box.start_workers(command_of(spec), timeout_s=TIMEOUT_S)
    failures = [end.failure for end in ended if end.failure]
    killed = any(end.killed_for_memory for end in ended)
    cell = Limited(
        job=job,
        layout=str(layout),
        times=times,
        forecast_bytes=needed_bytes,
        limit_bytes=limit_bytes,
        accepted=accepted,
        survived=not failures,
        error="" if killed else "; ".join(dict.fromkeys(failures)),
    )
    told = "survived" if cell.survived else cell.error or "killed"
    print(
        f"{job} {layout}, {limit_bytes / MIB:.0f} MiB, {'accepted' if accepted else 'refused'}: {told}",
        flush=True,
    )
    return cell


def table(directory: Path) -> str:
    cells = [Limited(**found) for found in kept(directory / "limits.jsonl")]  # type: ignore[arg-type]
    if not cells:
        return ""
    lines = [
        "Memory of the host over what the plan wants; *killed* or *survived*, of refused layouts without the margin.",
        "",
        f"| job | layout | forecast of all workers, MiB | {' | '.join(f'{times:g}×' for times in TIMES)} |",
        "|---" * (3 + len(TIMES)) + "|",
    ]
    by_layout: dict[tuple[str, str], dict[float, Limited]] = {}
    for cell in cells:
        by_layout.setdefault((cell.job, cell.layout), {})[cell.times] = cell
    for (job, layout), of_times in by_layout.items():
        told = []
        for times in TIMES:
            cell = of_times.get(times)
            result = "" if cell is None else "survived" if cell.survived else cell.error or "killed"
            told.append(f"{'accepted' if times >= 1 else 'refused'}, {result}" if result else "")
        needed = next(iter(of_times.values())).forecast_bytes
        lines.append(f"| {job} | {layout} | {needed / MIB:.0f} | {' | '.join(told)} |")
    accepted = [cell for cell in cells if cell.accepted]
    refused = [cell for cell in cells if not cell.accepted]
    lines += [
        "",
        f"Of {len(accepted)} accepted {sum(not cell.survived for cell in accepted)} did not survive; of {len(refused)} "
        f"refused {sum(cell.survived for cell in refused)} were refused without need.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--jobs", nargs="+", help="of those that were measured; by default all")
    parser.add_argument("--table", action="store_true", help="run nothing")
    arguments = parser.parse_args()
    measured = [path.parent.name for path in sorted(arguments.directory.glob("*/profile.json"))]
    if not arguments.table:
        run_limited(arguments.jobs or measured, arguments.directory)
    print(table(arguments.directory))


if __name__ == "__main__":
    main()
