"""Forecasts held against measurements, on this machine and on clusters in boxes.

    python benchmarks/forecast.py --out forecast.md              # this machine, all jobs: half an hour
    python benchmarks/forecast.py --jobs text conv --rounds 9
    python benchmarks/forecast.py --boxes here two-1g four-1g --results build/cells      # boxes need root
    python benchmarks/forecast.py --from build/cells --boxes here two-1g four-1g        # the tables again

For each job on each cluster (cell_clusters.py) all workers measure what the planner needs (`paceline plan` does the
same), and then time every layout of the space (cell_space.py) in interleaved rounds, all in the same processes. A
forecast is made of what was measured before; nothing of the timed steps goes into it. Layouts that were tried while
the job was measured are marked, and not counted. Beside each error stands the noise of the measurement itself: half
of the rounds against the other half. Jobs that the model of cost was corrected with are counted apart.

Between measuring a job and timing its layouts a shared machine gets slower or faster. By how much, the layouts tell
that were tried: their forecasts are what they took then. The median of measured over forecast among them is the pair's
*drift*; errors are given as they are, and once more with the forecasts of a pair times its drift.
"""

from __future__ import annotations

import argparse
import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import mean, median

from cell_clusters import CLUSTERS
from cells import (
    JOBS,
    TUNED_ON,
    WAITING,
    Cell,
    Pair,
    failures,
    finish,
    head,
    heading,
    measured_pairs,
    ms,
    percent,
    with_measuring,
)


def percentile(values: Sequence[float], share: float) -> float:
    """The smallest of the values that at least `share` of them do not exceed."""
    return sorted(values)[max(0, math.ceil(share * len(values)) - 1)]


def counted(cells: Sequence[Cell]) -> list[Cell]:
    """Those whose forecast is one: known, measured, and not tried beforehand."""
    return [cell for cell in cells if cell.off is not None and not cell.was_tried]


def drift(pair: Pair) -> float:
    """How much longer tried layouts took when they were timed than when they were tried; 1.0 where none was tried."""
    tried = [cell.off for cell in pair.timed if cell.was_tried and cell.off is not None]
    return 1 / (1 + median(tried)) if tried else 1.0


def summary(cells: Sequence[Cell], drifts: Mapping[tuple[str, str], float]) -> list[str]:
    """One row's cells of a table: errors of the cells, and the noise beside them.

    Args:
        drifts: by job and cluster.
    """
    errors = [abs(cell.off) for cell in cells if cell.off is not None]
    if not errors:
        return ["0", *["–"] * 8]
    still = [
        abs((1 + cell.off) * drifts[cell.job, cell.cluster] - 1) for cell in cells if cell.off is not None
    ]
    bias = median(cell.off for cell in cells if cell.off is not None)
    inside = mean(cell.is_inside for cell in cells)
    return [
        str(len(errors)),
        percent(mean(errors)),
        percent(median(errors)),
        percent(percentile(errors, 0.95)),
        percent(mean(still)),
        percent(percentile(still, 0.95)),
        percent(bias, "+"),
        percent(mean(cell.noise for cell in cells)),
        f"{inside:.0%}",
    ]


_SUMMARY = (
    "cells",
    "mean error",
    "median",
    "95th percentile",
    "without drift, mean",
    "95th",
    "median with sign",
    "mean noise",
    "inside the error bar",
)


def table(pairs: Sequence[Pair], title: str) -> str:
    cells = [cell for pair in pairs for cell in pair.timed]
    known = counted(cells)
    tried = [cell for cell in cells if cell.off is not None and cell.was_tried]
    clusters = dict.fromkeys(cell.cluster for cell in [*known, *tried])
    drifts = {(pair.job, pair.cluster): drift(pair) for pair in pairs}
    of = {
        f"tuned on: {', '.join(TUNED_ON)}": [cell for cell in known if cell.job in TUNED_ON],
        "all other jobs": [cell for cell in known if cell.job not in TUNED_ON],
        **{
            f"{job}": [cell for cell in known if cell.job == job]
            for job in dict.fromkeys(c.job for c in known)
        },
        **{
            f"{CLUSTERS[name].describe()} (`{name}`)": [cell for cell in known if cell.cluster == name]
            for name in clusters
        },
        "all other jobs than tuned on, tried or not": [
            cell for cell in [*known, *tried] if cell.job not in TUNED_ON
        ],
        "layouts that were tried": tried,
        **{f"… `{name}`": [cell for cell in tried if cell.cluster == name] for name in clusters},
        "all, tried or not": [*known, *tried],
    }
    lines = [title, "", *head("which", *_SUMMARY)]
    lines += [f"| {which} | {' | '.join(summary(found, drifts))} |" for which, found in of.items()]
    told = ", ".join(f"{job}@{cluster} {percent(found - 1, '+')}" for (job, cluster), found in drifts.items())
    lines += ["", f"Drift: {told}."]
    lines += ["", *head("job", "cluster", "layout", "forecast, ms", "measured, ms", "error", "noise")]
    lines += [
        f"| {cell.job} | {cell.cluster} | {cell.layout}{' (tried)' * cell.was_tried} | {_with_bar(cell)} "
        f"| {ms(cell.measured_s)} | {percent(cell.off, '+')} | {percent(cell.noise)} |"
        for cell in cells
    ]
    return "\n".join([*lines, "", *failures(pairs)]).rstrip() + "\n"


def _with_bar(cell: Cell) -> str:
    return ms(cell.forecast_s) + (f" ± {ms(cell.error_s)}" if cell.error_s is not None else "")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    with_measuring(parser, (name for name, cluster in CLUSTERS.items() if not cluster.is_curve))
    options = parser.parse_args()
    wanted = list(
        itertools.product(
            options.jobs or [job for job in JOBS if job not in WAITING], options.boxes or ["here"]
        )
    )
    pairs = measured_pairs(wanted, options)
    finish(table(pairs, heading("forecast.py", pairs)), options.out)


if __name__ == "__main__":
    main()
