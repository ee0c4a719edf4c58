"""What was measured of a job, in the terminal: passes of each block, bytes, a step's other costs, and links."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from paceline.plan.curves import Curve
from paceline.plan.profile import Costs, LinkedCluster, Profile
from paceline.report import formats
from paceline.report.hardware_text import print_collectives


def print_profile(console: Console, profile: Profile, linked: LinkedCluster) -> None:
    """All of it, one table after the other."""
    if profile.how_measured:
        console.print(Text(profile.how_measured))
    if profile.how_noisy:
        console.print(Text(profile.how_noisy))
        console.print()
    told = f"{profile.job}: batches of {formats.plural(profile.batch_size, 'sample')}"
    console.print(Text(f"{told}; the median of its steps is uncertain by {formats.percent(profile.spread)}"))
    console.print()
    for costs in profile.costs:
        title = f"Forward / backward pass of a block, ms: {_condition(costs, profile.device)}"
        console.print(Text(title, style="bold"))
        console.print(_passes(costs))
        console.print()
    console.print(Text("Bytes of a block", style="bold"))
    console.print(_bytes(profile))
    console.print()
    console.print(Text("Bytes of a sample in a block", style="bold"))
    console.print(_bytes_of_sample(profile))
    console.print(
        Text(
            "Kept for the backward pass, as it is and with selective and full recomputation; temporaries at worst."
        )
    )
    console.print()
    console.print(Text("A step beside its blocks", style="bold"))
    console.print(_others(profile))
    for name, link in (("Within a host", linked.within), ("Between hosts", linked.between)):
        if link is not None and link.measured:
            console.print()
            console.print(Text(f"{name}: {link.measured[0].workers} workers, {link.name}", style="bold"))
            print_collectives(console, link.measured)
    if profile.tried:
        console.print()
        console.print(Text("Layouts that were tried for a moment, ms a step", style="bold"))
        for tried in profile.tried:
            console.print(Text(f"{tried.step_s * 1e3:8.4g}  {tried.layout}"), soft_wrap=True)


def _condition(costs: Costs, device: str) -> str:
    told = formats.plural(costs.active, "worker") + (" at once" if costs.active > 1 else "")
    return told + (f" × {formats.plural(costs.threads, 'thread')}" if device == "cpu" else "")


def _table(first: str, others: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="")
    table.add_column(first, overflow="fold")
    for name in others:
        table.add_column(name, justify="right")
    return table


def _passes(costs: Costs) -> Table:
    """Against the samples of a micro-batch, of those numbers that were measured."""
    sizes = sorted({size for block in costs.blocks for size, _ in block.forward_s.points})
    table = _table("block", ["times", *(formats.plural(int(size), "sample") for size in sizes)])
    times = _times(costs)
    for at, block in enumerate(costs.blocks):
        table.add_row(block.name, str(times[at]), *_both(block.forward_s, block.backward_s, sizes))
        for part in block.divisions:
            table.add_row(f"  tp={part.tp}", "", *_both(part.forward_s, part.backward_s, sizes))
    return table


def _both(forward_s: Curve, backward_s: Curve, sizes: Sequence[float]) -> list[str]:
    return [f"{forward_s(size) * 1e3:.3g} / {backward_s(size) * 1e3:.3g}" for size in sizes]


def _times(costs: Costs) -> Counter[int]:
    """How often each kind of block is in the model."""
    return Counter(costs.row or range(len(costs.blocks)))


def _bytes(profile: Profile) -> Table:
    table = _table("block", ("parameters", "gradients", "state"))
    for block in profile.costs[0].blocks:
        state = block.trained_bytes * profile.state_per_byte
        table.add_row(block.name, *map(_size, (block.parameter_bytes, block.trained_bytes, state)))
    return table


def _bytes_of_sample(profile: Profile) -> Table:
    names = ("kept", "selective", "full", "temporary", "crosses a cut")
    table = _table("block", names)
    for block in profile.costs[0].blocks:
        kept = block.saved_bytes, block.saved_selective_bytes, block.saved_full_bytes
        table.add_row(block.name, *map(_size, (*kept, block.peak_bytes, block.output_bytes)))
    return table


def _size(num_bytes: float) -> str:
    return formats.size(num_bytes) if num_bytes else "–"


def _others(profile: Profile) -> Table:
    names = ("optimizer", "data", "fixed", "adding,\nGB/s", "product,\nGFLOP/s")
    table = _table("each of", names)
    for costs in profile.costs:
        trained_bytes = sum(block.trained_bytes for block in costs.model)
        table.add_row(
            _condition(costs, profile.device),
            formats.seconds(trained_bytes * costs.optimizer_s_per_byte),
            formats.seconds(costs.data_s(profile.batch_size)),
            formats.seconds(costs.fixed_s),
            f"{1e-9 / costs.add_s_per_byte:.3g}" if costs.add_s_per_byte else "–",
            f"{costs.product_flops_per_s / 1e9:.4g}" if costs.product_flops_per_s else "–",
        )
    return table
