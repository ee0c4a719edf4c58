"""Measuring what a job costs on one worker, block by block, for the planner.

The whole model runs forward and backward on real samples, as it would in training. Each call of a piece is timed where
it stands: its forward pass with the code before it; its backward pass from when the gradient of its outputs is there
until that of the call before it is. So the blocks add up to the whole, and are measured with the caches as they will
be.
"""

from __future__ import annotations

import collections
import dataclasses
import itertools
import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any

import torch
from torch.utils.data import default_collate

from paceline.job import Job
from paceline.plan.curves import Curve
from paceline.plan.profile import Block, Costs
from paceline.split.pieces import Piece, find_pieces
from paceline.split.stages import PieceCalls
from paceline.split.trees import tensors_in
from paceline.train.calling import caller
from paceline.train.data import ShareLoader, num_samples, to_device
from paceline.train.replica import Replica, StepResult
from paceline.train.session import Datasets
from paceline.train.work import count_work, product_flops_per_s, with_work

_ADDED_BYTES = 32 << 20
"""Of the tensors whose addition is timed: more than the caches hold, as gradients of a large model are."""
_FEWEST, _MOST = 3, 15
"""Passes of each size."""

GoOn = Callable[[bool], bool]
"""Called before each pass, with whether this worker would make one more: what all of them do, once all have called."""


@dataclasses.dataclass(frozen=True)
class Measured:
    """What one process has measured."""

    costs: Costs
    state_per_byte: float
    """Bytes of the optimizer's state for one byte of trained parameters."""
    step_s: float
    """Of one process on a whole batch, for comparison: median."""
    spread: float
    """Of the whole passes: half the middle half over the median, the largest of all sizes."""


def measure_costs(
    job: Job,
    datasets: Datasets,
    *,
    seed: int,
    device: torch.device,
    sizes: Sequence[int],
    threads: int,
    active: int = 1,
    budget_s: float = 10.0,
    go_on: GoOn = bool,
) -> Measured:
    """Measure in this process, which has its threads and its cores already.

    Args:
        sizes: samples of a micro-batch, ascending; each is measured, what is between follows the line through them.
        active: how many workers of this host do the same at the same time.
        budget_s: about how long the passes may take together.
        go_on: lets all of them make as many passes, and begin each together.

    Raises:
        PacelineError: the job fails on its first steps.
    """
    replica = Replica(job, seed=seed, device=device, precision="fp32", total_steps=job.steps or 1000)
    steps = _Steps(job, datasets, replica, seed, device)
    step_s, data_s, optimizer_s = steps.measure(budget_s / 4, go_on)
    trained = [p for p in replica.model.parameters() if p.requires_grad]
    trained_bytes = sum(p.nbytes for p in trained)
    state = [v for s in replica.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    passes = _Passes(job, replica, device)
    of_size = {}
    for size in sizes:
        batch = _first_samples(job, datasets["train"], size, device)
        of_size[size] = passes.measure(batch, budget_s * 3 / 4 / len(sizes), go_on)
    calls = passes.describe(_first_samples(job, datasets["train"], sizes[-1], device), sizes[-1])
    blocks, row = _blocks(calls, of_size)
    largest = _first_samples(job, datasets["train"], sizes[-1], device)
    blocks = with_work(blocks, row, count_work(job, replica, largest), sizes[-1])
    whole_s = sum(blocks[at].forward_s(job.batch_size) + blocks[at].backward_s(job.batch_size) for at in row)
    costs = Costs(
        threads=threads,
        active=active,
        blocks=blocks,
        row=row,
        optimizer_s_per_byte=optimizer_s / trained_bytes,
        add_s_per_byte=_addition_s(device, go_on) / _ADDED_BYTES,
        product_flops_per_s=product_flops_per_s(device, go_on),
        data_s=Curve(points=((float(job.batch_size), data_s),)),
        fixed_s=max(0.0, step_s - whole_s - optimizer_s - data_s),
    )
    return Measured(
        costs=costs,
        state_per_byte=sum(v.nbytes for v in state) / trained_bytes,
        step_s=step_s,
        spread=max(_spread(timing.whole_s) for timing in of_size.values()),
    )


@dataclasses.dataclass
class _Timing:
    """Passes of one size: of each call the seconds of each pass."""

    forward_s: list[list[float]]
    backward_s: list[list[float]]
    whole_s: list[float]


@dataclasses.dataclass
class _Call:
    """What one call of a piece holds, from a pass that was not timed; the last stands for what follows all pieces."""

    name: str
    kind: Any
    """Calls of one kind cost the same."""
    parameter_bytes: int
    trained_bytes: int
    saved_bytes: float
    """Of one sample; likewise below."""
    input_bytes: float
    output_bytes: float


class _Steps:
    """Whole steps of one process."""

    def __init__(
        self, job: Job, datasets: Datasets, replica: Replica, seed: int, device: torch.device
    ) -> None:
        self._replica = replica
        loader = ShareLoader(job, datasets["train"], seed=seed, micro=1, size=1, rank=0, device=device)
        self._batches = loader.endless()

    def measure(self, budget_s: float, go_on: GoOn) -> tuple[float, float, float]:
        """Seconds of a step, of reading its data, and of the optimizer: medians over whole batches."""
        # The first batch of an epoch is as large as there are samples for; its last one may be smaller.
        whole = self._replica.step(next(self._batches)).samples
        self._replica.step(next(self._batches))
        results: list[StepResult] = []
        end_s = time.perf_counter() + budget_s
        while go_on(len(results) < _FEWEST or (len(results) < 2 * _MOST and time.perf_counter() < end_s)):
            batch = next(self._batches)
            result = self._replica.step(batch)
            if result.samples == whole:
                results.append(result)
        return (
            median(r.step_s for r in results),
            median(r.data_s for r in results),
            median(r.optimizer_s for r in results),
        )


class _Passes:
    """Forward and backward passes of the whole model, with each call of a piece seen."""

    def __init__(self, job: Job, replica: Replica, device: torch.device) -> None:
        self._job, self._model, self._device = job, replica.model, device
        self._images = replica.images
        self._calls = PieceCalls(self._model, find_pieces(self._model))
        self._call_model = caller(job, self._model)

    def measure(self, batch: Any, budget_s: float, go_on: GoOn) -> _Timing:
        timing = _Timing([], [], [])
        self._timed(batch)  # warms up
        end_s = time.perf_counter() + budget_s
        while go_on(
            len(timing.whole_s) < _FEWEST or (len(timing.whole_s) < _MOST and time.perf_counter() < end_s)
        ):
            forward_s, backward_s = self._timed(batch)
            timing.forward_s.append(forward_s)
            timing.backward_s.append(backward_s)
            timing.whole_s.append(sum(forward_s) + sum(backward_s))
        return timing

    def _timed(self, batch: Any) -> tuple[list[float], list[float]]:
        """Seconds of each call and of what follows the last one, forward and backward."""
        ends_s: list[float] = []
        gradients_s: list[float | None] = []

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            ends_s.append(self._now_s())
            number = len(gradients_s)
            gradients_s.append(None)
            for tensor in tensors_in(outputs):
                if tensor.requires_grad and not tensor.is_leaf:
                    tensor.register_hook(lambda gradient: came(number))
            return outputs

        def came(number: int) -> None:
            gradients_s[number] = self._now_s()

        self._calls.on_call = call
        try:
            begin_s = self._now_s()
            loss = self._loss(batch)
            end_s = self._now_s()
            loss.backward()
            backward_end_s = self._now_s()
        finally:
            self._calls.on_call = None
            self._model.zero_grad(set_to_none=True)
        forward_s = [b - a for a, b in zip([begin_s, *ends_s], [*ends_s, end_s], strict=True)]
        # Backward, from the last call to the first; a gradient that is not seen, or comes early, takes no time.
        backward_s: list[float] = []
        at_s = end_s
        for there_s in reversed(gradients_s):
            there_s = max(at_s, at_s if there_s is None else there_s)
            backward_s.append(there_s - at_s)
            at_s = there_s
        backward_s.append(backward_end_s - at_s)
        return forward_s, backward_s[::-1]

    def describe(self, batch: Any, samples: int) -> list[_Call]:
        """What each call holds; and, last, what is around them."""
        found: list[_Call] = []
        parameters = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        counted: set[int] = set()
        stored: set[int] = set(parameters)

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            before = len(saved)
            outputs = forward(*args, **kwargs)
            own = [p for p in piece.module.parameters() if id(p) not in counted]
            counted.update(map(id, own))
            shapes = tuple((p.shape, p.dtype, p.requires_grad) for p in own)
            input_bytes = sum(t.nbytes for t in tensors_in((args, kwargs)) if t.data_ptr() not in parameters)
            output_bytes = sum(t.nbytes for t in tensors_in(outputs))
            found.append(
                _Call(
                    name=piece.name,
                    kind=(type(piece.module), shapes, input_bytes, output_bytes),
                    parameter_bytes=sum(p.nbytes for p in own),
                    trained_bytes=sum(p.nbytes for p in own if p.requires_grad),
                    saved_bytes=sum(saved[before:]) / samples,
                    input_bytes=input_bytes / samples,
                    output_bytes=output_bytes / samples,
                )
            )
            return outputs

        saved: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in stored:
                stored.add(storage.data_ptr())
                saved.append(storage.nbytes())
            return tensor

        self._calls.on_call = call
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = self._loss(batch)
        finally:
            self._calls.on_call = None
        around = [p for p in self._model.parameters() if id(p) not in counted]
        within = sum(call.saved_bytes for call in found)
        found.append(
            _Call(
                name="loss",
                kind="loss",
                parameter_bytes=sum(p.nbytes for p in around),
                trained_bytes=sum(p.nbytes for p in around if p.requires_grad),
                saved_bytes=max(0.0, sum(saved) / samples - within),
                input_bytes=found[-1].output_bytes if found else 0.0,
                output_bytes=0.0,
            )
        )
        del loss
        return found

    def _loss(self, batch: Any) -> torch.Tensor:
        loss: Any = self._job.loss(self._call_model(self._images.arrange(batch)), batch)
        whole: torch.Tensor = loss[0] / loss[1] if isinstance(loss, tuple) else loss
        return whole

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _blocks(calls: Sequence[_Call], of_size: dict[int, _Timing]) -> tuple[tuple[Block, ...], tuple[int, ...]]:
    """Calls of one kind become one block, with the mean of what they take; and the row of blocks."""
    kinds: dict[Any, list[int]] = collections.defaultdict(list)
    for number, call in enumerate(calls):
        kinds[call.kind].append(number)
    blocks = []
    for numbers in kinds.values():
        first = calls[numbers[0]]
        forward, backward = {}, {}
        for size, timing in of_size.items():
            forward[float(size)] = _mean_of_medians(timing.forward_s, numbers)
            backward[float(size)] = _mean_of_medians(timing.backward_s, numbers)
        blocks.append(
            Block(
                name=first.name,
                forward_s=Curve.of(forward),
                backward_s=Curve.of(backward),
                parameter_bytes=first.parameter_bytes,
                trained_bytes=first.trained_bytes,
                saved_bytes=sum(calls[n].saved_bytes for n in numbers) / len(numbers),
                # Products of matrices, which selective recomputation keeps, may be all that is saved.
                saved_selective_bytes=sum(calls[n].saved_bytes for n in numbers) / len(numbers),
                saved_full_bytes=first.input_bytes,
                output_bytes=first.output_bytes,
            )
        )
    place = {number: at for at, numbers in enumerate(kinds.values()) for number in numbers}
    return tuple(blocks), tuple(place[number] for number in range(len(calls)))


def _mean_of_medians(passes: list[list[float]], numbers: list[int]) -> float:
    return sum(median(seconds[n] for seconds in passes) for n in numbers) / len(numbers)


def _addition_s(device: torch.device, go_on: GoOn) -> float:
    """Seconds to add two tensors of `_ADDED_BYTES`, in place."""
    one, other = (torch.ones(_ADDED_BYTES // 4, device=device) for _ in range(2))
    found = []
    for _ in range(7):
        go_on(True)
        begin_s = time.perf_counter()
        one.add_(other)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(time.perf_counter() - begin_s)
    return median(found[2:])


def _first_samples(job: Job, dataset: Any, count: int, device: torch.device) -> Any:
    collate: Callable[[list[Any]], Any] = job.collate or default_collate
    length = num_samples(dataset, "train")
    if length is None:
        samples = list(itertools.islice(dataset, count))
    else:
        samples = [dataset[number] for number in range(min(count, length))]
    # Of fewer than are wanted some are taken again.
    repeated = list(itertools.islice(itertools.cycle(samples), count))
    return to_device(collate(repeated), device)


def _spread(values: list[float]) -> float:
    ordered = sorted(values)
    quarter = len(ordered) // 4
    return (ordered[-1 - quarter] - ordered[quarter]) / 2 / median(ordered)
