"""Measuring what a job costs on one worker with a model that is too large for it: one block at a time.

`Walk` finds the blocks, and what each is given. One call of each kind then gets its parameters, runs forward and
backward by itself, updates what it trains, and gives its memory back before the next. What is around the blocks is
timed in whole passes in which they are left out.

Cost: the largest block, with its gradients and its optimizer's state; and arguments and results of a call of each kind.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from statistics import mean, median
from typing import Any

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.job import Job
from paceline.plan.curves import Curve
from paceline.plan.profile import Costs
from paceline.split.trees import flatten, tensors_in
from paceline.train.data import ShareLoader
from paceline.train.device_clock import done_s
from paceline.train.device_speeds import MOVED_BYTES, addition_s, product_flops_per_s
from paceline.train.held_memory import Growth
from paceline.train.passes import FEWEST, GoOn, Passes, Timing, wants_more
from paceline.train.profiling import (
    WHOLE_SHARE,
    Curves,
    Measured,
    as_blocks,
    first_samples,
    pass_s,
    relative_error,
)
from paceline.train.replica import Replica
from paceline.train.session import Datasets
from paceline.train.thrown_away import replica_to_measure
from paceline.train.walk import Unit, Walk
from paceline.train.work import with_work

_LEAST_BYTES = 1 << 16
_UPDATES = 4
"""Of a block's parameters: the first makes the optimizer's state."""


@dataclasses.dataclass
class _Passes:
    """Forward and backward passes of one block."""

    forward_s: list[float] = dataclasses.field(default_factory=list)
    backward_s: list[float] = dataclasses.field(default_factory=list)


class BlockCosts:
    """Measures one job block by block, under one condition after the other."""

    def __init__(
        self,
        job: Job,
        datasets: Datasets,
        *,
        seed: int,
        device: torch.device,
        sizes: Sequence[int],
        precision: str = "fp32",
    ) -> None:
        """
        Args:
            sizes: as in `measure_costs`.

        Raises:
            JobError: the model has no blocks, or calls them differently from batch to batch.
        """
        self._job, self._datasets, self._seed, self._device = job, datasets, seed, device
        self._sizes = sizes
        self._replica = replica_to_measure(
            job, datasets, seed=seed, device=device, precision=precision, in_parts=True
        )
        self._walk = Walk(job, self._replica)
        self._batches = {size: first_samples(job, datasets["train"], size, device) for size in sizes}
        self._walk.first(self._batches[sizes[-1]], sizes[-1])
        for size in sizes[:-1]:
            self._walk.again(self._batches[size], size)
        self._size = sizes[-1]
        self._around = Passes(job, self._replica, device, stand_in=self._stand_in)
        self._state: dict[int, int] = {}
        """Bytes of the optimizer's state of each unit, and of what is around them (-1)."""
        self._processor_s = self._passed_s = 0.0

    def measure(
        self, *, threads: int, group: Group | None = None, budget_s: float = 10.0, go_on: GoOn = bool
    ) -> Measured:
        """As `measure_costs`, in this process, which has its threads and its cores already.

        The first call also finds out what each block holds.
        """
        walk, largest = self._walk, self._sizes[-1]
        takes_statistics = self._replica.takes_statistics
        measures_among = takes_statistics and group is not None and group.size > 1
        among_units = [u for u in walk.units if measures_among and walk.calls[u.number].channels]
        each_s = budget_s / len(self._sizes) / (len(walk.units) + 1 + len(among_units))
        self._processor_s = self._passed_s = 0.0
        around, updates_s = self._measure_around(each_s, go_on)
        alone: dict[int, dict[int, _Passes]] = {}
        among: dict[int, dict[int, _Passes]] = {}
        for number, unit in enumerate(walk.units):
            with self._replica.deferred.filled(unit.read):
                if number not in self._state:
                    self._find_peak(unit)
                alone[number] = {s: self._repeat(unit, s, each_s, go_on) for s in self._sizes}
                if unit in among_units:
                    assert group is not None
                    with self._replica.among(group):
                        among[number] = {s: self._repeat(unit, s, each_s, go_on) for s in self._sizes}
                update_s, self._state[number] = self._update(unit.own, go_on)
                updates_s += update_s
        of_size = {size: self._together(around[size], alone, size) for size in self._sizes}
        pauses = self._device.type == "cpu" and self._processor_s < WHOLE_SHARE * self._passed_s
        among_curves = None
        if among:
            timings = {s: self._together(around[s], alone | among, s) for s in self._sizes}
            among_curves = Curves(timings, 1.0, pauses)
        curves = Curves(of_size, 1.0, pauses)
        blocks, row = as_blocks(walk.calls, curves, among_curves, takes_statistics=takes_statistics)
        blocks = with_work(blocks, row, walk.work, largest)
        # Each kind of block was updated once.
        measured_bytes = sum(block.trained_bytes for block in blocks)
        trained_bytes = sum(blocks[at].trained_bytes for at in row)
        state_bytes = sum(self._state.get(n, 0) for n in walk.row) + self._state[-1]
        data_s = self._data_s()
        optimizer_s_per_byte = updates_s / measured_bytes
        costs = Costs(
            threads=threads,
            active=1 if group is None else group.size,
            blocks=blocks,
            row=row,
            crossing_bytes=tuple(call.crossing_bytes for call in walk.calls),
            optimizer_s_per_byte=optimizer_s_per_byte,
            add_s_per_byte=addition_s(self._device, go_on) / MOVED_BYTES,
            product_flops_per_s=product_flops_per_s(self._device, go_on),
            data_s=Curve(points=((float(self._job.batch_size), data_s),)),
        )
        return Measured(
            costs=costs,
            state_per_byte=state_bytes / trained_bytes,
            step_s=pass_s(of_size[largest], pauses) + data_s + trained_bytes * optimizer_s_per_byte,
            spread=relative_error(of_size[largest].whole_s),
            pauses=pauses,
        )

    def work_for(self, seconds: float) -> tuple[int, float]:
        """Passes of the block that computes most, for so long: their number, and what they took."""
        unit = max(self._walk.units, key=lambda u: self._walk.work[u.number][0])
        number, begin_s = 0, 0.0
        with self._replica.deferred.filled(unit.read):
            self._once(unit, self._sizes[-1])
            begin_s = time.perf_counter()
            while number < FEWEST or time.perf_counter() - begin_s < seconds:
                self._once(unit, self._sizes[-1])
                number += 1
            taken_s = time.perf_counter() - begin_s
        return number, taken_s

    def _measure_around(self, each_s: float, go_on: GoOn) -> tuple[dict[int, Timing], float]:
        """Passes without the calls, by samples; and seconds of an update of what no call has."""
        walk, largest = self._walk, self._sizes[-1]
        found = {}
        with self._replica.deferred.filled([*walk.between, *walk.around]):
            if -1 not in self._state:
                self._around.measure(self._batches[largest], 0.0, bool)
                growth = Growth(self._device)
                self._around.measure(self._batches[largest], 0.0, bool)
                gradients = sum(p.nbytes for p in walk.between if p.requires_grad)
                self._note_peak(-1, growth, gradients)
            for size, batch in self._batches.items():
                self._size = size
                found[size] = self._around.measure(batch, each_s, go_on)
            update_s, self._state[-1] = self._update(walk.around, go_on)
        return found, update_s

    def _stand_in(self, number: int, args: Any, kwargs: Any) -> Any:
        return self._walk.stand_in(number, self._size, args, kwargs)

    def _find_peak(self, unit: Unit) -> None:
        """What a backward pass of the block holds beside what is saved and gradients, at most."""
        self._once(unit, self._sizes[-1])
        growth = Growth(self._device)
        self._once(unit, self._sizes[-1])
        self._note_peak(unit.number, growth, sum(p.nbytes for p in unit.read if p.requires_grad))

    def _note_peak(self, number: int, growth: Growth, gradient_bytes: int) -> None:
        grown, samples = growth.most_bytes(), self._sizes[-1]
        call = self._walk.calls[number]
        kept = call.saved_bytes * samples + gradient_bytes
        # Where the system does not tell, as if a block had its results and their gradients.
        more = 2 * call.output_bytes * samples if grown is None else max(0.0, grown - kept)
        for other in self._walk.calls:
            if other.kind == call.kind:
                other.peak_bytes = more / samples

    def _repeat(self, unit: Unit, samples: int, budget_s: float, go_on: GoOn) -> _Passes:
        found = _Passes()
        self._once(unit, samples)  # warms up
        begin_s = time.perf_counter()
        while go_on(wants_more(len(found.forward_s), time.perf_counter() - begin_s, budget_s)):
            before_s = time.process_time()
            forward_s, backward_s = self._once(unit, samples)
            self._processor_s += time.process_time() - before_s
            self._passed_s += forward_s + backward_s
            found.forward_s.append(forward_s)
            found.backward_s.append(backward_s)
        return found

    def _once(self, unit: Unit, samples: int) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass, which leave nothing behind."""
        args, kwargs = unit.arguments[samples].begin()
        given = {id(leaf) for leaf in flatten((args, kwargs))[0]}
        try:
            with self._replica.forward_context():
                begin_s = done_s(self._device)
                outputs = unit.forward(*args, **kwargs)
                forward_s = done_s(self._device) - begin_s
            ends = [t for t in tensors_in(outputs) if t.requires_grad and id(t) not in given]
            gradients = [torch.full_like(t, 1e-3) for t in ends]
            begin_s = done_s(self._device)
            if ends:
                torch.autograd.backward(ends, gradients)
            return forward_s, done_s(self._device) - begin_s
        finally:
            for parameter in unit.read:
                parameter.grad = None

    def _update(self, parameters: Sequence[nn.Parameter], go_on: GoOn) -> tuple[float, int]:
        """Seconds of the optimizer's step on these alone, clipping included; bytes of its state of them."""
        trained = [p for p in parameters if p.requires_grad]
        if not trained:
            return 0.0, 0
        found_s = []
        with _only(self._replica.optimizer, trained) as optimizer:
            for p in trained:
                p.grad = torch.full_like(p, 1e-3)
            for _ in range(_UPDATES):
                go_on(True)
                begin_s = done_s(self._device)
                if self._job.clip_norm is not None:
                    nn.utils.clip_grad_norm_(trained, self._job.clip_norm)
                optimizer.step()
                found_s.append(done_s(self._device) - begin_s)
            return median(found_s[1:]), _state_bytes(optimizer, trained)

    def _together(self, around: Timing, alone: dict[int, dict[int, _Passes]], samples: int) -> Timing:
        """Passes of the whole model: what is around the blocks, and the block of its kind in the place of each call."""
        units = [alone[at][samples] for at in self._walk.row]
        number = min(len(around.whole_s), *(len(u.forward_s) for u in units))
        timing = Timing()
        for at in range(number):
            forward_s, backward_s = list(around.forward_s[at]), list(around.backward_s[at])
            for call, unit in enumerate(units):
                forward_s[call] += unit.forward_s[at]
                backward_s[call] += unit.backward_s[at]
            timing.forward_s.append(forward_s)
            timing.backward_s.append(backward_s)
            timing.whole_s.append(sum(forward_s) + sum(backward_s))
        return timing

    def _data_s(self) -> float:
        loader = ShareLoader(
            self._job, self._datasets["train"], seed=self._seed, micro=1, size=1, rank=0, device=self._device
        )
        batches = loader.endless()
        return mean(next(batches).data_s for _ in range(1 + FEWEST))


def state_per_byte(replica: Replica) -> float:
    """Bytes of the optimizer's state for one of trained parameters, from a step on a single one."""
    sizes = sorted((p for p in replica.model.parameters() if p.requires_grad), key=lambda p: p.nbytes)
    # Of small ones a count of steps would be much.
    one = next((p for p in sizes if p.nbytes >= _LEAST_BYTES), sizes[-1])
    with replica.deferred.filled([one]), _only(replica.optimizer, [one]) as optimizer:
        one.grad = torch.zeros_like(one)
        optimizer.step()
        return _state_bytes(optimizer, [one]) / one.nbytes


def _state_bytes(optimizer: Any, parameters: Sequence[nn.Parameter]) -> int:
    values = [v for p in parameters for v in optimizer.state[p].values()]
    return sum(v.nbytes for v in values if isinstance(v, torch.Tensor))


@contextlib.contextmanager
def _only(optimizer: Any, parameters: Sequence[nn.Parameter]) -> Any:
    """Within it the optimizer trains these alone; what it keeps of them, and their gradients, go afterwards."""
    wanted = {id(p) for p in parameters}
    groups, all_of = optimizer.param_groups, [group["params"] for group in optimizer.param_groups]
    for group in groups:
        group["params"] = [p for p in group["params"] if id(p) in wanted]
    optimizer.param_groups = [group for group in groups if group["params"]]
    try:
        yield optimizer
    finally:
        for group, own in zip(groups, all_of, strict=True):
            group["params"] = own
        optimizer.param_groups = groups
        for parameter in parameters:
            optimizer.state.pop(parameter, None)
            parameter.grad = None
