"""What one job costs on one device, block by block; and what it may be spread over."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Self

from pydantic import Field, model_validator

from paceline.plan.curves import Curve
from paceline.plan.links import Link
from paceline.records import Cluster, Layout, Record

MOST_SPREAD = 0.1
"""Relative error of measurements above which they are not kept, and said to be noisy."""
Exchange = tuple[str, float]
"""A collective and its bytes for one sample."""
ALONE, DATA, SHARDED, GATHERED, COPIES, TENSOR, PIPELINE = (
    "alone",
    "data",
    "sharded",
    "gathered",
    "copies",
    "tensor",
    "pipeline",
)
"""Ways of splitting, each of which may take longer than the sum of its parts: none; with one copy of the parameters or
an all-reduce; ZeRO-1 and 2; ZeRO-3; copies of either; tensor parallelism; pipelines."""


class Division(Record):
    """A block under tensor parallelism of one size: what one worker's part of it costs."""

    tp: int = Field(ge=2)
    forward_s: Curve
    backward_s: Curve
    parameter_bytes: int = Field(ge=0)
    trained_bytes: int = Field(ge=0)
    saved_bytes: float = Field(ge=0)
    """Of one sample; likewise below, and as in `Block`."""
    saved_selective_bytes: float = Field(ge=0)
    saved_full_bytes: float = Field(ge=0)
    peak_bytes: float = Field(ge=0)
    forward_exchanges: tuple[Exchange, ...] = ()
    backward_exchanges: tuple[Exchange, ...] = ()


class Block(Record):
    """A piece of the model between two places where it may be cut."""

    name: str
    forward_s: Curve
    """Seconds on one worker, against the samples of a micro-batch."""
    backward_s: Curve
    """Of inputs and weights together."""
    weights_share: float = Field(default=0.5, ge=0, le=1)
    """Of the backward pass: what the gradients of weights take."""
    selective_share: float = Field(default=0.5, ge=0, le=1)
    """Of the forward pass: what selective recomputation takes, where that was not measured."""
    parameter_bytes: int = Field(default=0, ge=0)
    trained_bytes: int = Field(default=0, ge=0)
    """Of the parameters that are trained; gradients take as many."""
    saved_bytes: float = Field(default=0.0, ge=0)
    """What the forward pass of one sample keeps for the backward pass."""
    saved_selective_bytes: float = Field(default=0.0, ge=0)
    """The same under selective recomputation."""
    saved_full_bytes: float = Field(default=0.0, ge=0)
    """The same where all is computed again: the block's inputs."""
    peak_bytes: float = Field(default=0.0, ge=0)
    """Temporaries of one sample at the worst moment."""
    output_bytes: float = Field(default=0.0, ge=0)
    """Of one sample: its results, which cross a cut after it in one direction where nothing else is known."""
    closes: bool = False
    """It is what follows the model's last piece, the loss among it: always where that is."""
    flops: float = Field(default=0.0, ge=0)
    """Floating-point operations of one sample's forward pass in products of matrices and convolutions."""
    operations: int = Field(default=0, ge=0)
    """Calls of the framework in a forward pass, views apart: what a GPU has to be told one by one."""
    divisions: tuple[Division, ...] = ()
    forward_among_s: Curve | None = None
    """Forward where a micro-batch is split among the workers of a host and the block takes statistics over all of them
    (batch norm); None: that makes no difference to it, or was not measured."""
    backward_among_s: Curve | None = None
    statistics: tuple[Exchange, ...] = ()
    """What each worker exchanges for that in each micro-batch, whatever the number of samples: in the two curves, where
    there are any, for the measured number of workers."""

    def divided(self, tp: int) -> Block | Division | None:
        """What one of `tp` workers computes; None where that is not known."""
        if tp == 1:
            return self
        return next((d for d in self.divisions if d.tp == tp), None)


def between(points: Sequence[tuple[float, float]], at: float) -> float:
    """On the lines through `points`, whose first numbers ascend; before the first, and after the last, as there."""
    if at <= points[0][0]:
        return points[0][1]
    for (x0, y0), (x1, y1) in itertools.pairwise(points):
        if at <= x1:
            return y0 + (y1 - y0) * (at - x0) / (x1 - x0)
    return points[-1][1]


class Costs(Record):
    """A job's costs on one worker with `threads` threads, beside `active - 1` others on its host."""

    threads: int = Field(ge=1)
    active: int = Field(ge=1)
    blocks: tuple[Block, ...] = Field(min_length=1)
    """Each kind once."""
    row: tuple[int, ...] = ()
    """The model, from inputs to loss, as numbers of `blocks`; empty: each once."""
    crossing_bytes: tuple[float, ...] = ()
    """Of each in the row, of one sample: what crosses a cut after it in one direction. Code between the blocks may
    pool, or join, or hand values on past many of them. Empty: the blocks' results do."""
    optimizer_s_per_byte: float = Field(ge=0)
    """Seconds of the optimizer's step for one byte of trained parameters."""
    add_s_per_byte: float = Field(default=0.0, ge=0)
    """Seconds to add one byte of gradients to another in memory; a copy is taken to cost the same."""
    product_flops_per_s: float = Field(default=0.0, ge=0)
    """Of a product of large matrices, under the same conditions; 0: not measured."""
    data_s: Curve = Curve.line(0.0, 0.0)
    """Seconds to read a worker's samples, against their number."""
    fixed_s: float = Field(default=0.0, ge=0)
    """Of each step, whatever is in it."""
    meeting_s: float = Field(default=0.0, ge=0)
    """Until all workers of a host have met."""

    @model_validator(mode="after")
    def _row_is_right(self) -> Self:
        if any(not 0 <= at < len(self.blocks) for at in self.row):
            raise ValueError("the row names a block that is not there")
        if self.crossing_bytes and len(self.crossing_bytes) != len(self.row or self.blocks):
            raise ValueError(f"{len(self.crossing_bytes)} cuts between {len(self.row or self.blocks)} blocks")
        return self

    @functools.cached_property
    def model(self) -> tuple[Block, ...]:
        """All blocks in the model's order."""
        return tuple(self.blocks[at] for at in self.row) if self.row else self.blocks

    @functools.cached_property
    def sends_bytes(self) -> tuple[float, ...]:
        """Of each block in the model's order, of one sample: what crosses a cut after it."""
        return self.crossing_bytes or tuple(block.output_bytes for block in self.model)

    @property
    def most_stages(self) -> int:
        """Into how many stages the model can be cut."""
        return max(1, len(self.model) - self.model[-1].closes)


class Tried(Record):
    """A layout whose steps were timed, some of them, while the job was measured."""

    layout: Layout
    step_s: float = Field(gt=0)
    """Median."""
    rest_s: float = 0.0
    """Of that, what the corrections leave, which are of several layouts; less than nothing where they are too much."""
    peak_bytes: int | None = None
    """What a worker that only trains in it would hold at most; None: not known."""
    evaluation_peak_bytes: int | None = None
    """The same of one that evaluates."""


class Correction(Record):
    """What splitting in a way, or in several at once, takes beyond the sum of the terms, as steps have shown that were
    timed; less than nothing where those are too much."""

    ways: tuple[str, ...]
    """As `ways_of` gives them. Of several: what they take together beyond what each takes by itself."""
    workers: int | None = Field(default=None, ge=2)
    """Among how many that was found. What many wait for grows with the logarithm of their number, as the largest of as
    many delays does; None: it is taken to be the same for all."""
    over_network: bool = False
    """Whether these were on several hosts."""
    threads: int | None = None
    """Of a process alone: how many it had."""
    step_s: float = 0.0
    """In a step of one micro-batch; of pipelines, of any number."""
    micro_s: float = 0.0
    """For each further micro-batch. Where it is less than nothing: up to `micro`, since it might be noise."""
    micro: int = Field(default=1, ge=1)
    """Micro-batches of the largest number that was tried."""
    action_s: float = Field(default=0.0, ge=0)
    """What an action of a pipeline's schedule takes beside its blocks."""
    weight_action_s: float | None = None
    """The same of gradients of weights where these are actions of their own; None: not known."""
    few_action_s: float | None = None
    """The same in steps of no more than `few` micro-batches, which then cost nothing beside it; None: `action_s`."""
    few: int = Field(default=0, ge=0)
    split_step_s: float | None = None
    """In a step of a schedule in which gradients of weights are actions of their own; None: `step_s`."""
    split_micro_s: float = 0.0
    """Of several ways: for each micro-batch of such a schedule, on top."""


class Profile(Record):
    """What was measured of a job on one kind of device."""

    job: str
    batch_size: int = Field(ge=1)
    device: str
    costs: tuple[Costs, ...] = Field(min_length=1)
    state_per_byte: float = Field(ge=0)
    """Bytes of the optimizer's state for one byte of trained parameters: 2 for Adam in one precision."""
    shares_update: bool = True
    """The optimizer's work can be shared out among a host's workers, which then have one copy of the parameters."""
    base_bytes: int = Field(ge=0)
    """Of a worker, whatever the model: the framework and what it takes when it is first used, the data sets."""
    mapped_bytes: int = Field(default=0, ge=0)
    """Of a worker: pages of files, as the code of libraries, which the host has once."""
    splitting_bytes: int = Field(default=0, ge=0)
    """Of a worker whose layout splits the model, or computes again: the code for that, on top."""
    recomputed_bytes: dict[str, float] = {}
    """By what is computed again, of one sample: what is held beyond what all blocks keep and the whole of one; negative
    where it is less."""
    recomputed_shares: dict[str, tuple[tuple[float, float], ...]] = {}
    """By what is computed again, `(samples, share)`, ascending: what that takes of a forward pass over so many samples.
    On a GPU more than all of it, where the processor is kept busy with telling it what to keep."""
    evaluation_samples: int = Field(default=0, ge=0)
    """Of a batch of an evaluation, in all."""
    evaluated_bytes: float = Field(default=0.0, ge=0)
    """Of one of these: what a forward pass holds that keeps nothing for a backward pass, and the metrics."""
    evaluation_bytes: float = 0.0
    """What an evaluation holds beside that, the parameters, the optimizer's state and `base_bytes`; negative where some
    of these are not needed then."""
    tried: tuple[Tried, ...] = ()
    """Layouts that were timed for a moment, some of each way of splitting: what `corrections` were taken from."""
    corrections: tuple[Correction, ...] = ()
    unexplained_bytes: dict[str, float] = {}
    """By way of splitting: what a worker held at most beyond what was foreseen, in steps."""
    unexplained_evaluation_bytes: dict[str, float] = {}
    """And in an evaluation."""
    past_error: float = Field(default=0.1, ge=0)
    """Relative, of earlier forecasts on this machine."""
    spread: float = Field(default=0.0, ge=0)
    """Relative error of the measurements: of a median step, the largest of all conditions."""
    why_in_blocks: str = ""
    """Why the model was measured block by block, and never had all of it in memory; empty: it was measured whole."""

    @property
    def how_measured(self) -> str:
        """A sentence where the model was measured block by block; else empty."""
        if not self.why_in_blocks:
            return ""
        return f"The model was measured block by block, as {self.why_in_blocks}."

    @property
    def how_noisy(self) -> str:
        """A sentence where the measurements vary too much to plan with; else empty."""
        if self.spread <= MOST_SPREAD:
            return ""
        return (
            f"The machine was busy while it was measured: the median of the timed steps is uncertain by "
            f"{self.spread:.0%}. Forecasts are as uncertain; measure again when other programs have ended."
        )

    def of(self, threads: int | None, active: int) -> Costs:
        """The costs that come nearest: of as many threads if any, then of as many workers at a time."""
        wanted = threads or 1
        return min(
            self.costs,
            key=lambda c: (abs(c.threads - wanted), abs(c.active - active), c.active),
        )

    def slowdown(self, costs: Costs, samples: float) -> float:
        """How many times as long a pass of so many samples takes under `costs` as in a process alone on its host; 1
        where that was not measured."""
        alone = [c for c in self.costs if c.threads == costs.threads and c.active == 1]
        if costs.active == 1 or not alone:
            return 1.0
        own_s, alone_s = (
            sum(block.forward_s(samples) + block.backward_s(samples) for block in c.model)
            for c in (costs, alone[0])
        )
        return own_s / alone_s if alone_s else 1.0


class LinkedCluster(Record):
    """A cluster with what connects its hosts, and its workers within them: what a plan is made for."""

    cluster: Cluster
    within: Link
    """Among workers of one host."""
    between: Link | None = None
    """Of each host with all others."""
    speeds: tuple[float, ...] = ()
    """Of each host, relative to the device of the profile; empty: all 1."""
    within_of: tuple[Link, ...] = ()
    """Of each host, where they are unequal; empty: all have `within`."""
    between_of: tuple[Link, ...] = ()
    """The same of what connects a host with the others."""
    launcher_bytes: int = Field(default=0, ge=0)
    """Of each host's memory: what the process holds that has started its workers."""

    @model_validator(mode="after")
    def _one_for_each_host(self) -> Self:
        hosts = len(self.cluster.hosts)
        for name in ("within_of", "between_of"):
            if len(getattr(self, name)) not in (0, hosts):
                raise ValueError(f"{name}: give one link for each of {hosts} hosts")
        if self.speeds and (len(self.speeds) != hosts or min(self.speeds) <= 0):
            raise ValueError(f"give one speed above 0 for each of {hosts} hosts")
        if hosts > 1 and self.between is None:
            raise ValueError(f"{hosts} hosts, and no link between them")
        return self

    @functools.cached_property
    def speeds_of_workers(self) -> tuple[float, ...]:
        """Of the host of each worker."""
        speeds = self.speeds or (1.0,) * len(self.cluster.hosts)
        return tuple(
            speed for host, speed in zip(self.cluster.hosts, speeds, strict=True) for _ in range(host.workers)
        )

    def slowest(self, workers: int) -> float:
        """The speed of the slowest host that any of the first `workers` workers is on."""
        return min(self.speeds[: self.hosts_of(workers)]) if self.speeds else 1.0

    def hosts_of(self, workers: int) -> int:
        """How many hosts the first `workers` workers are on: hosts are filled one after the other."""
        for number, host in enumerate(self.cluster.hosts, 1):
            workers -= host.workers
            if workers <= 0:
                return number
        return len(self.cluster.hosts)

    @property
    def has_unequal_links(self) -> bool:
        return bool(self.within_of or self.between_of)

    def links_of(self, hosts: int) -> tuple[tuple[Link, Link | None], ...]:
        """Each pair of a link within a host and one between hosts that there is among the first `hosts`; 0: all.

        All wait for the slowest in each part of an exchange: its time is the largest over these pairs.
        """
        return self._pairs[hosts - 1] if hosts else self._pairs[-1]

    def worker_bytes(self, workers: int) -> int:
        """What each of so many workers may use of its host's memory; a GPU has its own, whoever else works."""
        most = []
        for host in self.cluster.hosts:
            here = min(host.workers, workers)
            if here:
                sharers = here if self.cluster.device == "cpu" else host.workers
                most.append((host.memory_bytes - self.launcher_bytes) // sharers)
            workers -= here
        return max(0, min(most))

    @functools.cached_property
    def _pairs(self) -> tuple[tuple[tuple[Link, Link | None], ...], ...]:
        """`links_of` of 1, 2, … hosts."""
        numbers = range(1, len(self.cluster.hosts) + 1)
        within = [dict.fromkeys(self.within_of[:n] or (self.within,)) for n in numbers]
        between = [dict.fromkeys(self.between_of[:n] or (self.between,)) for n in numbers]
        return tuple(tuple(itertools.product(w, b)) for w, b in zip(within, between, strict=True))

    @functools.cached_property
    def per_host(self) -> int:
        """Workers of a host: of the one that has fewest."""
        return min(host.workers for host in self.cluster.hosts)
