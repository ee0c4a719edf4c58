"""Measuring what a job costs on one worker, block by block, for the planner.

The whole model runs forward and backward on real samples, as it would in training, with each call of a piece timed
where it stands (`Passes`); whole steps are timed before and after, and the blocks are made to add up to them.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import math
import time
from collections.abc import Callable, Sequence
from statistics import mean, median
from typing import Any

import torch
from torch.utils.data import default_collate

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh
from paceline.job import Job
from paceline.plan.curves import Curve
from paceline.plan.profile import Block, Costs, Division, Exchange
from paceline.train.data import ShareLoader, few_samples, num_samples, to_device
from paceline.train.device_speeds import MOVED_BYTES, addition_s, product_flops_per_s
from paceline.train.passes import CLOSING, Call, GoOn, Passes, Timing, wants_more
from paceline.train.replica import Replica
from paceline.train.session import Datasets
from paceline.train.step import StepResult
from paceline.train.thrown_away import replica_to_measure
from paceline.train.work import count_work, with_work

WHOLE_SHARE = 0.9
"""Of its time a process has a processor, unless it is paused."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one process has measured."""

    costs: Costs
    state_per_byte: float
    """Bytes of the optimizer's state for one byte of trained parameters."""
    step_s: float
    """Of one process on a whole batch, for comparison: median."""
    spread: float
    """Relative error of that median, by the middle half of the steps."""
    pauses: bool = False
    """The process had a processor only part of the time: what is shorter than a pause mostly does not see one."""


def measure_costs(
    job: Job,
    datasets: Datasets,
    *,
    seed: int,
    device: torch.device,
    sizes: Sequence[int],
    threads: int,
    group: Group | None = None,
    precision: str = "fp32",
    budget_s: float = 10.0,
    go_on: GoOn = bool,
) -> Measured:
    """Measure in this process, which has its threads and its cores already.

    Args:
        sizes: samples of a micro-batch, ascending up to the job's batch; each is measured, what is between follows the
            line through them.
        group: the workers of this host that do the same at the same time; None: nobody else does.
        budget_s: about how long the passes may take together.
        go_on: lets all of them make as many passes, and begin each together.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    replica = replica_to_measure(job, datasets, seed=seed, device=device, precision=precision)
    batches = {size: first_samples(job, datasets["train"], size, device) for size in sizes}
    steps = _Steps(job, datasets, replica, seed, device)
    steps.measure(budget_s / 8, go_on)
    passes = Passes(job, replica, device)
    measures_among = replica.takes_statistics and group is not None and group.size > 1
    each_s = budget_s * 3 / 4 / len(sizes) / (2 if measures_among else 1)
    of_size = {size: passes.measure(batch, each_s, go_on) for size, batch in batches.items()}
    among: dict[int, Timing] = {}
    if measures_among:
        assert group is not None
        with replica.among(group):
            among = {size: passes.measure(batch, each_s, go_on) for size, batch in batches.items()}
    largest = sizes[-1]
    inputs = passes.measure_inputs(batches[largest], each_s / 2, go_on)
    steps.measure(budget_s / 8, go_on)
    pauses = steps.pauses()
    step_s, data_s, optimizer_s = steps.typical()
    calls = passes.describe(batches[sizes[-1]], sizes[-1])
    rest_s = step_s - data_s - optimizer_s
    # Blocks take no more than the step.
    whole_pass_s = pass_s(of_size[sizes[-1]], pauses)
    share = min(1.0, rest_s / whole_pass_s)
    curves, among_curves = (Curves(timings, share, pauses) for timings in (of_size, among))
    blocks, row = as_blocks(
        calls, curves, among_curves if among else None, takes_statistics=replica.takes_statistics
    )
    if inputs is not None:
        blocks = _with_weights_shares(blocks, row, of_size[largest], inputs)
    blocks = with_work(blocks, row, count_work(job, replica, batches[sizes[-1]]), sizes[-1])
    whole_s = sum(blocks[at].forward_s(job.batch_size) + blocks[at].backward_s(job.batch_size) for at in row)
    trained_bytes = sum(p.nbytes for p in replica.model.parameters() if p.requires_grad)
    state = [v for s in replica.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    costs = Costs(
        threads=threads,
        active=1 if group is None else group.size,
        blocks=blocks,
        row=row,
        crossing_bytes=tuple(call.crossing_bytes for call in calls),
        optimizer_s_per_byte=optimizer_s / trained_bytes,
        add_s_per_byte=addition_s(device, go_on) / MOVED_BYTES,
        product_flops_per_s=product_flops_per_s(device, go_on),
        data_s=Curve(points=((float(job.batch_size), data_s),)),
        fixed_s=max(0.0, rest_s - whole_s),
    )
    return Measured(
        costs=costs,
        state_per_byte=sum(v.nbytes for v in state) / trained_bytes,
        step_s=step_s,
        spread=steps.error(),
        pauses=pauses,
    )


def measure_division(
    job: Job,
    datasets: Datasets,
    mesh: Mesh,
    costs: Costs,
    *,
    seed: int,
    device: torch.device,
    sizes: Sequence[int],
    precision: str = "fp32",
    budget_s: float = 3.0,
    go_on: GoOn = bool,
    pauses: bool = False,
) -> Costs | None:
    """`costs` with what tensor parallelism over the workers of `mesh` makes of each block. A collective call of them.

    Each pass is timed as for whole blocks, without the time spent in collectives, which are noted by kind and bytes.
    None where the model is called otherwise than whole, so that the blocks cannot be told apart.

    Args:
        pauses: as `Measured.pauses` of the same workers.

    Raises:
        LayoutError: the model cannot be divided so.
    """
    replica = replica_to_measure(job, datasets, seed=seed, device=device, precision=precision, in_parts=True)
    replica.split(mesh, few_samples(job, datasets["train"], device))
    passes = Passes(job, replica, device, mesh.tensor)
    batches = {size: first_samples(job, datasets["train"], size, device) for size in sizes}
    of_size = {s: passes.measure(b, budget_s / len(sizes), go_on) for s, b in batches.items()}
    largest = sizes[-1]
    exchanges = passes.exchanges(batches[largest])
    calls = passes.describe(batches[largest], largest)
    if len(calls) != len(costs.model):
        return None
    curves = Curves(of_size, 1.0, pauses)
    blocks = []
    for at, block in enumerate(costs.blocks):
        numbers = [number for number, place in enumerate(costs.row) if place == at]
        first = numbers[0]
        saved = sum(calls[n].saved_bytes for n in numbers) / len(numbers)
        division = Division(
            tp=mesh.tensor.size,
            forward_s=curves.forward(numbers),
            backward_s=curves.backward(numbers),
            parameter_bytes=calls[first].parameter_bytes,
            trained_bytes=calls[first].trained_bytes,
            saved_bytes=saved,
            saved_selective_bytes=saved,
            saved_full_bytes=calls[first].input_bytes,
            peak_bytes=0.0,
            forward_exchanges=_of_one_sample(exchanges[first][0], largest),
            backward_exchanges=_of_one_sample(exchanges[first][1], largest),
        )
        blocks.append(block.model_copy(update={"divisions": (*block.divisions, division)}))
    return costs.model_copy(update={"blocks": tuple(blocks)})


def _of_one_sample(exchanges: Sequence[Exchange], samples: int) -> tuple[Exchange, ...]:
    return tuple((kind, num_bytes / samples) for kind, num_bytes in exchanges)


class _Steps:
    """Whole steps of one process."""

    def __init__(
        self, job: Job, datasets: Datasets, replica: Replica, seed: int, device: torch.device
    ) -> None:
        self._replica, self._device = replica, device
        loader = ShareLoader(job, datasets["train"], seed=seed, micro=1, size=1, rank=0, device=device)
        self._batches = loader.endless()
        self._whole = 0
        self._results: list[StepResult] = []
        self._processor_s = 0.0

    def measure(self, budget_s: float, go_on: GoOn) -> None:
        """Train for about so long; the first time after two steps that warm up."""
        if not self._whole:
            # The first batch of an epoch is as large as there are samples for; its last one may be smaller.
            self._whole = self._replica.step(next(self._batches)).samples
            self._replica.step(next(self._batches))
        number = 0
        begin_s = time.perf_counter()
        while go_on(wants_more(number, time.perf_counter() - begin_s, budget_s)):
            batch = next(self._batches)
            before_s = time.process_time()
            result = self._replica.step(batch)
            if result.samples == self._whole:
                number += 1
                self._results.append(result)
                self._processor_s += time.process_time() - before_s

    def pauses(self) -> bool:
        """Whether the process had a processor only part of the time: through a quota, or shared with others."""
        if self._device.type != "cpu":
            return False
        return self._processor_s < WHOLE_SHARE * sum(r.step_s for r in self._results)

    def typical(self) -> tuple[float, float, float]:
        """Seconds of a step, of reading its data, and of the optimizer, over whole batches.

        Medians, which rare disturbances do not change; with pauses means, as medians would leave these out.
        """
        of = mean if self.pauses() else median
        return (
            of(r.step_s for r in self._results),
            of(r.data_s for r in self._results),
            of(r.optimizer_s for r in self._results),
        )

    def error(self) -> float:
        """Of the median step."""
        return relative_error([r.step_s for r in self._results])


def relative_error(values: Sequence[float]) -> float:
    """Standard error of the median, relative: 0.93 times the middle half's width over √n, for normal noise."""
    ordered = sorted(values)
    quarter = len(ordered) // 4
    width = ordered[-1 - quarter] - ordered[quarter]
    return 0.93 * width / math.sqrt(len(ordered)) / median(ordered)


def as_blocks(
    calls: Sequence[Call], curves: Curves, among: Curves | None, *, takes_statistics: bool
) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """Calls of one kind become one block, with the mean of what they take; and the row of blocks.

    Args:
        among: the same curves where workers take statistics over all of them; None: not measured.
    """
    kinds: dict[Any, list[int]] = collections.defaultdict(list)
    for number, call in enumerate(calls):
        kinds[call.kind].append(number)
    blocks = []
    for numbers in kinds.values():
        first = calls[numbers[0]]
        saved = sum(calls[n].saved_bytes for n in numbers) / len(numbers)
        block = Block(
            name=first.name,
            forward_s=curves.forward(numbers),
            backward_s=curves.backward(numbers),
            parameter_bytes=first.parameter_bytes,
            trained_bytes=first.trained_bytes,
            saved_bytes=saved,
            # Products of matrices, which selective recomputation keeps, may be all that is saved.
            saved_selective_bytes=saved,
            saved_full_bytes=first.input_bytes,
            output_bytes=first.output_bytes,
            peak_bytes=first.peak_bytes,
            closes=first.kind == CLOSING,
        )
        if takes_statistics and first.channels:
            block = block.model_copy(update={"statistics": _statistics(first.channels)})
        if among and first.channels:
            update = {"forward_among_s": among.forward(numbers), "backward_among_s": among.backward(numbers)}
            block = block.model_copy(update=update)
        blocks.append(block)
    place = {number: at for at, numbers in enumerate(kinds.values()) for number in numbers}
    return tuple(blocks), tuple(place[number] for number in range(len(calls)))


def _with_weights_shares(
    blocks: Sequence[Block], row: Sequence[int], whole: Timing, inputs: Timing
) -> tuple[Block, ...]:
    """Blocks with what of their backward passes the gradients of weights take, from passes that have computed all
    gradients and those of inputs alone."""
    found = []
    for at, block in enumerate(blocks):
        numbers = [number for number, place in enumerate(row) if place == at]
        # The first call has no inputs with gradients; its like have.
        numbers = [number for number in numbers if number] or numbers
        all_s, inputs_s = (_mean_of_medians(timing.backward_s, numbers) for timing in (whole, inputs))
        share = min(1.0, max(0.0, 1.0 - inputs_s / all_s)) if all_s else 0.0
        found.append(block.model_copy(update={"weights_share": share}))
    return tuple(found)


def _statistics(channels: Sequence[int]) -> tuple[Exchange, ...]:
    """What batch norms of so many channels exchange in a micro-batch (`split/batchnorm.py`), of each worker."""
    gathered = [("all-gather", 4.0 * (2 * number + 1)) for number in channels]
    return (*gathered, *(("all-reduce", 8.0 * number) for number in channels))


class Curves:
    """Seconds of calls against samples: their medians over the passes, made to add up to the whole passes.

    A whole pass is lengthened by a pause that most of its calls do not see.
    """

    def __init__(self, timings: dict[int, Timing], share: float, pauses: bool) -> None:
        """
        Args:
            share: of the whole passes that the calls are to add up to.
        """
        self._timings = timings
        self._scales = {s: share * pass_s(t, pauses) / t.sum_of_medians_s() for s, t in timings.items()}

    def forward(self, numbers: Sequence[int]) -> Curve:
        """The mean over the calls of these numbers."""
        return self._curve({size: timing.forward_s for size, timing in self._timings.items()}, numbers)

    def backward(self, numbers: Sequence[int]) -> Curve:
        return self._curve({size: timing.backward_s for size, timing in self._timings.items()}, numbers)

    def _curve(self, passes_s: dict[int, list[list[float]]], numbers: Sequence[int]) -> Curve:
        means = {size: _mean_of_medians(found, numbers) for size, found in passes_s.items()}
        return Curve.of({float(size): seconds * self._scales[size] for size, seconds in means.items()})


def pass_s(timing: Timing, pauses: bool) -> float:
    """Of a pass."""
    return mean(timing.whole_s) if pauses else median(timing.whole_s)


def _mean_of_medians(passes: list[list[float]], numbers: Sequence[int]) -> float:
    return sum(median(seconds[n] for seconds in passes) for n in numbers) / len(numbers)


def first_samples(job: Job, dataset: Any, count: int, device: torch.device) -> Any:
    collate: Callable[[list[Any]], Any] = job.collate or default_collate
    length = num_samples(dataset, "train")
    if length is None:
        samples = list(itertools.islice(dataset, count))
    else:
        samples = [dataset[number] for number in range(min(count, length))]
    # Of fewer than are wanted some are taken again.
    repeated = list(itertools.islice(itertools.cycle(samples), count))
    return to_device(collate(repeated), device)
