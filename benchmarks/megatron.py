"""Forecasts held against the published weak-scaling table of Megatron-LM.

    python benchmarks/megatron.py                 # seconds: nothing is measured
    python benchmarks/megatron.py --out table.md

Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using Megatron-LM", table 1: GPT
models of 1.7 to 1,008 billion parameters on 32 to 3,072 A100 80 GB. Layouts and achieved FLOP/s are the table's. The
micro-batches and the interleaving, which the table does not list, are those of the authors' script for it
(examples/sc21/run_table_1.sh of Megatron-LM). The time of a step follows from the achieved FLOP/s and the paper's
formula of a step's operations.

Each row becomes a profile, made of the architecture alone: products of matrices at a share of the A100's peak, or as
fast as memory allows, and every other kernel by the bytes that it reads and writes. That share is all that is fitted,
on the rows named in `TUNING`. It comes in two forms: one number for all products; and, since small products reach less,
two numbers (`Share`), a form that was taken when the errors of the first had been seen. The closed form has one number
of its own, fitted on the same rows; and it is also given the blocks of the second form, to part what the blocks bring
from what playing the schedule and placing the collectives bring.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from statistics import mean

from closed_form import closed_form_s
from megatron_table import ROWS, Row, S, V, check

from paceline.plan.curves import Curve
from paceline.plan.forecast import Forecaster
from paceline.plan.links import Link
from paceline.plan.presets import DEVICES, INTERCONNECTS
from paceline.plan.profile import Block, Costs, Division, LinkedCluster, Profile
from paceline.plan.terms import Forecast
from paceline.records import Cluster, Host

A100 = DEVICES["a100-80gb"]
PEAK = A100.flops_per_s["fp16"]
assert A100.memory_bytes_per_s is not None
MEMORY_BYTES_PER_S = A100.memory_bytes_per_s
NVLINK = INTERCONNECTS["nvlink3"].link.model_copy(update={"bytes_per_s": 235e9})
"""What NCCL itself takes an A100's ring to reach (src/graph/tuning.cc), of the 300 GB/s of the datasheet."""
INFINIBAND = INTERCONNECTS["infiniband-hdr"].link.model_copy(update={"cables": 8})
HALF = 2
"""Bytes of a number in fp16."""
TUNING = ("1.7", "145.6")
"""Rows that the share of the peak is fitted on: one with data parallelism alone, one with everything."""


@dataclasses.dataclass(frozen=True)
class Share:
    """What products of matrices reach of the peak."""

    most: float
    """Where the inner dimension is long."""
    filling: float = 0.0
    """A product takes as long as if its inner dimension were longer by this: a tile of its result costs something
    before the first and after the last of its multiplications."""


def product_s(m: float, k: float, n: float, share: Share, times: float = 1.0) -> float:
    """Seconds of `times` products of an m × k and a k × n matrix, in fp16."""
    computing_s = 2 * m * (k + share.filling) * n / (PEAK * share.most)
    moving_s = HALF * (m * k + k * n + m * n) / MEMORY_BYTES_PER_S
    return times * max(computing_s, moving_s)


def layer_s(row: Row, b: int, share: Share) -> tuple[float, float]:
    """Seconds of one GPU for its part of a layer and b samples: forward, and backward without forward again."""
    h, t, tokens = row.h, row.tp, b * S
    width = h / row.heads
    products = [
        (tokens, h, 3 * h / t, 1),
        (S, width, S, b * row.heads / t),
        (S, S, width, b * row.heads / t),
        (tokens, h / t, h, 1),
        (tokens, h, 4 * h / t, 1),
        (tokens, 4 * h / t, h, 1),
    ]
    forward_s, backward_s = 0.0, 0.0
    for m, k, n, times in products:
        forward_s += product_s(m, k, n, share, times)
        backward_s += product_s(m, n, k, share, times) + product_s(k, m, n, share, times)
    hidden, scores = tokens * h, b * row.heads * S * S / t
    # Bytes of the other kernels. Forward: two layer norms (4 a number), two fused bias-dropout-additions (7, their mask
    # is a byte); bias-GeLU (4 a number, of 4 h / t); softmax with scale and mask (4) and dropout (5) of the scores.
    forward_bytes = (2 * 4 + 2 * 7) * hidden + 16 * hidden / t + 9 * scores
    # Backward: layer norms (6) with the residual's gradient added (6), dropouts (5); GeLU (6); softmax (6) and its
    # dropout (5).
    backward_bytes = (2 * 12 + 2 * 5) * hidden + 24 * hidden / t + 11 * scores
    # A micro-batch's gradients of the weights are added to what is there.
    backward_bytes += 3 * HALF * 12 * h**2 / t
    return forward_s + forward_bytes / MEMORY_BYTES_PER_S, backward_s + backward_bytes / MEMORY_BYTES_PER_S


def head_s(row: Row, b: int, share: Share) -> float:
    """Logits and loss, forward and backward: they are not computed again."""
    tokens, words = b * S, V / row.tp
    products_s = product_s(tokens, row.h, words, share) + product_s(tokens, words, row.h, share)
    products_s += product_s(row.h, tokens, words, share)
    # The loss in float32: conversion 6 bytes, largest 4, difference 8, exponential 8, sum 4, quotient 8; backward 14.
    return products_s + 52 * tokens * words / MEMORY_BYTES_PER_S


def simple_layer_s(row: Row, b: int, share: Share) -> tuple[float, float]:
    """As closed forms have it: operations over a share of the peak."""
    flops = 24 * b * S * row.h**2 * (1 + S / (6 * row.h)) / row.tp
    return flops / (PEAK * share.most), 2 * flops / (PEAK * share.most)


def simple_head_s(row: Row, b: int, share: Share) -> float:
    return 6 * b * S * row.h * V / row.tp / (PEAK * share.most)


def profile_of(row: Row, share: Share, *, simple: bool = False) -> Profile:
    """The row's job as the planner's record: a block for each layer, the last with the head.

    What the head takes forward counts as backward: it is not computed again. The embedding takes no time.
    """
    of_layer, of_head = (simple_layer_s, simple_head_s) if simple else (layer_s, head_s)
    sizes = sorted({1, 2, row.micro_samples})
    layers = {b: of_layer(row, b, share) for b in sizes}
    forward = Curve.of({float(b): layers[b][0] for b in sizes})
    backward = Curve.of({float(b): layers[b][1] for b in sizes})
    with_head = Curve.of({float(b): layers[b][1] + of_head(row, b, share) for b in sizes})
    sample_bytes = float(HALF * S * row.h)

    def block(name: str, backward_s: Curve, parameters: float) -> Block:
        own = int(HALF * parameters / row.tp)
        # The same numbers whole or divided: only this row's size of tensor parallelism is asked for.
        numbers = {
            "forward_s": forward,
            "backward_s": backward_s,
            "parameter_bytes": own,
            "trained_bytes": own,
            "saved_bytes": sample_bytes,
            "saved_full_bytes": sample_bytes,
        }
        exchanges = (("all-reduce", sample_bytes),) * 2
        division = Division(
            tp=max(2, row.tp),
            saved_selective_bytes=sample_bytes,
            peak_bytes=0.0,
            forward_exchanges=exchanges,
            backward_exchanges=exchanges,
            **numbers,
        )
        # Each GPU of a tensor-parallel group sends its share to the next stage: the paper's scatter/gather.
        return Block(
            name=name,
            output_bytes=sample_bytes / row.tp,
            divisions=(division,) if row.tp > 1 else (),
            **numbers,
        )

    of_one = 12 * row.h**2 + 13 * row.h
    outer = (V + S) * row.h
    kinds = (
        block("first", backward, of_one + outer),
        block("layer", backward, of_one),
        # In a pipeline the last stage has a copy of the embedding for its logits.
        block("last", with_head, of_one + (V * row.h if row.pp > 1 else 0)),
    )
    # For a parameter, of two bytes: gradient to float32 (6), looked through (4), its norm (4), scaled (8); Adam (28);
    # back to fp16 (6).
    costs = Costs(
        threads=1,
        active=1,
        blocks=kinds,
        row=(0, *(1,) * (row.layers - 2), 2),
        optimizer_s_per_byte=56 / HALF / MEMORY_BYTES_PER_S,
    )
    return Profile(
        job=f"GPT {row.billions} B",
        batch_size=row.batch,
        device="cuda",
        costs=(costs,),
        state_per_byte=8.0,
        base_bytes=1 << 30,
    )


def cluster_of(row: Row) -> LinkedCluster:
    """DGX A100 hosts: eight GPUs on NVLink 3, and as many cables of InfiniBand HDR."""
    hosts = tuple(
        Host(
            name=f"dgx{number}",
            device="cuda",
            device_name=A100.name,
            cores=128,
            memory_bytes=8 * A100.memory_bytes,
            workers=8,
        )
        for number in range(row.gpus // 8)
    )
    between: Link = INFINIBAND
    return LinkedCluster(cluster=Cluster(hosts=hosts), within=NVLINK, between=between)


def planned(row: Row, share: Share) -> Forecast:
    return Forecaster(profile_of(row, share), cluster_of(row)).forecast(row.layout)


def planned_s(row: Row, share: Share) -> float:
    return planned(row, share).step_s


def closed_s(row: Row, share: Share) -> float:
    return closed_form_s(profile_of(row, share, simple=True), cluster_of(row), row.layout)


def closed_on_blocks_s(row: Row, share: Share) -> float:
    """The closed form with the planner's blocks."""
    return closed_form_s(profile_of(row, share), cluster_of(row), row.layout)


def fitted_most(forecast_s: Callable[[Row, Share], float]) -> Share:
    """One share for all products: the tuning rows come out right on average, their mean log error being zero."""
    rows = [row for row in ROWS if row.billions in TUNING]

    def off(most: float) -> float:
        return mean(math.log(forecast_s(row, Share(most)) / row.step_s) for row in rows)

    return Share(_where_zero(off, 0.2, 1.0))


def fitted_both(forecast_s: Callable[[Row, Share], float]) -> Share:
    """A share with which both tuning rows come out right."""
    first, second = (row for row in ROWS if row.billions in TUNING)

    def filled(most: float) -> Share:
        """What makes the first row right."""
        return Share(
            most, _where_zero(lambda filling: first.step_s - forecast_s(first, Share(most, filling)), 0, 4000)
        )

    return filled(_where_zero(lambda most: forecast_s(second, filled(most)) - second.step_s, 0.62, 1.0))


def _where_zero(falling: Callable[[float], float], low: float, high: float) -> float:
    for _ in range(30):
        middle = (low + high) / 2
        if falling(middle) > 0:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, help="write the table to this file as well")
    parser.add_argument("--terms", action="store_true", help="print what each forecast is made of")
    arguments = parser.parse_args()
    for row in ROWS:
        check(row)
    text = table()
    print(text)
    if arguments.terms:
        share = fitted_both(planned_s)
        for row in ROWS:
            terms = planned(row, share).terms.to_json()
            print(row.billions, {name: f"{s / row.step_s:.1%}" for name, s in terms.items() if s})
    if arguments.out:
        arguments.out.write_text(text)


def table() -> str:
    both, one, closed = fitted_both(planned_s), fitted_most(planned_s), fitted_most(closed_s)
    forecasts = {
        "error": lambda row: planned_s(row, both),
        "with one share": lambda row: planned_s(row, one),
        "closed form": lambda row: closed_s(row, closed),
        "closed form, same blocks": lambda row: closed_on_blocks_s(row, both),
    }
    lines = [
        f"Fitted on the rows marked \\*: products reach {both.most:.3f} of the peak, as if their inner dimension were "
        f"{both.filling:.0f} longer; with one share for all, {one.most:.3f}; in the closed form {closed.most:.3f}.",
        "",
        f"| parameters | GPUs | layout | micro-batch | published, s | forecast, s | {' | '.join(forecasts)} |",
        "|---" * (6 + len(forecasts)) + "|",
    ]
    errors: dict[str, list[float]] = {name: [] for name in forecasts}
    for row in ROWS:
        offs = {name: forecast_s(row) / row.step_s - 1 for name, forecast_s in forecasts.items()}
        is_tuning = row.billions in TUNING
        for name, off in offs.items():
            errors[name] += [] if is_tuning else [off]
        layout = row.layout.model_copy(update={"recompute": "none"})
        mark = "\\*" if is_tuning else ""
        lines.append(
            f"| {row.billions} B{mark} | {row.gpus:,} | {layout} | {row.micro_samples} "
            f"| {row.step_s:.2f} | {planned_s(row, both):.2f} | {' | '.join(f'{off:+.1%}' for off in offs.values())} |"
        )
    for what, of in (("mean", mean), ("largest", max)):
        cells = [f"{of([abs(off) for off in found]):.1%}" for found in errors.values()]
        lines.append(f"| {what} of the others | | | | | | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
