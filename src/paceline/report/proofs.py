"""The proof that a layout computes what one process computes, in words and as a table."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.records import PROOF_TOLERANCE, Layout
from paceline.report import formats
from paceline.report.kinds import Difference, ProofEvent


def verdict(proof: ProofEvent) -> str:
    """One or two sentences."""
    off = (
        f" Switched off for the proof: {formats.join(list(proof.switched_off))}."
        if proof.switched_off
        else ""
    )
    off += "".join(f" {left_whole(piece, why)}" for piece, why in proof.left_whole.items())
    if proof.drawn_at_random:
        return (
            "Not proven: the model draws random numbers that cannot be switched off, so that no two runs are "
            "equal, in whatever layout." + off
        )
    told = (
        f"{proof.compared:,} quantities of {formats.plural(proof.steps, 'step')} "
        f"on {formats.plural(proof.samples, 'sample')}"
    )
    worst = f"{_what(proof.worst[0])}, {_how_far(proof.worst[0])}" if proof.worst else "nothing"
    if proof.status != "equal":
        found = [] if not proof.worst or _is_equal(proof.worst[0]) else [worst]
        found += [proof.parted] if proof.parted else []
        layout = Layout.from_json(proof.layout)
        narrow = (
            f" It could not be judged in float64: {proof.why_not_float64}." if proof.why_not_float64 else ""
        )
        different = f"Layout {layout} is DIFFERENT from one process of plain PyTorch"
        return f"{different}: {'; '.join(found)}.{narrow}{off}"
    if not proof.in_float64:
        return f"Equal to one process of plain PyTorch: {told}; the worst is {worst}.{off}"
    wide = proof.in_float64[0]
    return (
        f"Equal to one process of plain PyTorch: {told}. In float64 the worst is {_what(wide)}, {_how_far(wide)}; "
        f"in float32 rounding grows to {_how_far(proof.worst[0])} in {_what(proof.worst[0])}, as it does between any "
        f"two orders of summation where ReLU or max-pooling decide by the last digit.{off}"
    )


def left_whole(piece: str, why: str) -> str:
    """One sentence about a piece that tensor parallelism does not divide."""
    return f"{piece} is not divided, as it would not compute the same on parts ({why})."


def print_proof(console: Console, proof: ProofEvent) -> None:
    """The largest differences as a table, and the verdict."""
    console.print(
        Text(f"layout {Layout.from_json(proof.layout)} against one process, in float32", style="bold")
    )
    if proof.worst:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
        for title in ("", "name", "step", "relative error", ""):
            table.add_column(title, justify="right" if title in ("step", "relative error") else "left")
        other = "rounding" if proof.status == "equal" else "DIFFERENT"
        for difference in proof.worst:
            table.add_row(
                difference.kind,
                difference.name,
                str(difference.step),
                _how_far(difference),
                "" if _is_equal(difference) else other,
            )
        console.print(table)
        console.print(
            Text(
                f"largest differences of {proof.compared:,}; up to {PROOF_TOLERANCE:.0e} is rounding",
                style="dim",
            )
        )
    console.print(Text(verdict(proof)), soft_wrap=True)


def _what(difference: Difference) -> str:
    what = f"the {difference.kind}"
    named = f"{what} of {difference.name}" if difference.name else what
    return f"{named} in step {difference.step}"


def _how_far(difference: Difference) -> str:
    return difference.note if difference.relative_error is None else f"{difference.relative_error:.1e}"


def _is_equal(difference: Difference) -> bool:
    return difference.relative_error is not None and difference.relative_error <= PROOF_TOLERANCE
