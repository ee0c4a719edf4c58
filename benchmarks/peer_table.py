"""What was measured of each program, and the tables made of it (peers.py)."""

from __future__ import annotations

import dataclasses
import math
from statistics import geometric_mean, median, quantiles

EQUAL_WITHIN = 1e-4
"""Relative distance up to which losses of the first steps count as equal."""


@dataclasses.dataclass
class Row:
    """One program on one job."""

    program: str
    note: str = ""
    """Why nothing was measured, or what the losses' cell says in place of a comparison."""
    step_s: list[float] = dataclasses.field(default_factory=list)
    """Seconds per global batch, round by round."""
    ratios: list[float] = dataclasses.field(default_factory=list)
    """How many times as long as paceline's choice it takes, round by round."""
    peak_bytes: int = 0
    """Of the worker that held most."""
    distance: float | None = None
    """The largest relative distance of its losses from those of one process; None where it is not to be compared."""
    other_training: bool = False
    """Its losses may differ: batch statistics stay on each worker."""

    @property
    def equal(self) -> bool:
        return self.distance is None or self.distance <= EQUAL_WITHIN

    @property
    def wrong(self) -> bool:
        """It trains something else, and should not."""
        return not self.equal and not self.other_training


@dataclasses.dataclass
class JobResult:
    """All programs on one job."""

    job: str
    choice: str
    batch_size: int
    rounds: int
    rows: list[Row]


def to_markdown(results: list[JobResult], heading: list[str]) -> str:
    lines = [*heading, ""]
    for result in results:
        lines += [*_job(result), ""]
    if len(results) > 1:
        lines += _means(results)
    return "\n".join(lines).rstrip() + "\n"


def spread(values: list[float], digits: int) -> str:
    """The median, and the middle half."""
    if len(values) < 2:
        return f"{values[0]:.{digits}f}"
    low, _, high = quantiles(values, n=4, method="inclusive")
    return f"{median(values):.{digits}f} ({low:.{digits}f} – {high:.{digits}f})"


def _job(result: JobResult) -> list[str]:
    lines = [
        f"## {result.job}",
        "",
        f"Global batch of {result.batch_size} samples, {result.rounds} rounds. paceline's choice: {result.choice}.",
        "",
        "| program | milliseconds per step | samples/s | times as long as paceline's choice | peak MiB per worker "
        "| losses |",
        "|---" * 6 + "|",
    ]
    for row in result.rows:
        if not row.step_s:
            lines.append(f"| {row.program} | {row.note} | | | | |")
            continue
        cells = [
            spread([s * 1e3 for s in row.step_s], 2),
            f"{result.batch_size / median(row.step_s):.0f}",
            spread(row.ratios, 2),
            f"{row.peak_bytes / 2**20:.0f}",
            _losses(row),
        ]
        lines.append(f"| {row.program} | " + " | ".join(cells) + " |")
    return lines


def _losses(row: Row) -> str:
    if row.distance is None:
        return row.note
    if row.other_training:
        return f"other training ({row.distance:.0e})"
    return f"equal ({row.distance:.0e})" if row.equal else f"**unequal** ({row.distance:.0e})"


def _means(results: list[JobResult]) -> list[str]:
    """Geometric means of the medians, over the jobs on which a program trains the same."""
    lines = [
        "## All jobs",
        "",
        "Geometric mean of the median ratios, over those jobs on which the program trains the same as one process.",
        "",
        "| program | times as long as paceline's choice | jobs |",
        "|---" * 3 + "|",
    ]
    for program in dict.fromkeys(row.program for result in results for row in result.rows):
        found = [
            median(row.ratios)
            for result in results
            for row in result.rows
            if row.program == program and row.ratios and row.equal and not row.other_training
        ]
        mean = f"{geometric_mean(found):.2f}" if found else "–"
        lines.append(f"| {program} | {mean} | {len(found)} |")
    return lines


def largest_distance(losses: list[float], reference: list[float]) -> float:
    """The largest relative distance of a program's losses from another's; infinite where one is no number."""
    distances = [abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True)]
    return math.inf if any(math.isnan(d) for d in distances) else max(distances)
