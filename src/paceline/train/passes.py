"""Forward and backward passes of a job's model with each call of a piece seen where it stands.

Each call is timed in place: its forward pass with the code before it; its backward pass from when the gradient of its
outputs is there until that of the call before it is. So the calls add up to the whole, and are measured with the caches
as they will be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from statistics import median
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from paceline.comm.group import Group
from paceline.errors import PacelineError
from paceline.job import Job
from paceline.split.crossing import Crossing
from paceline.split.pieces import Piece, find_pieces
from paceline.split.stages import PieceCalls
from paceline.split.tensor_mode import plainly
from paceline.split.trees import tensors_in
from paceline.train.device_clock import DeviceClock, Mark
from paceline.train.replica import Replica

FEWEST, MOST = 3, 15
"""Passes of each size."""
LEAST_S = 0.15
"""More than `MOST` are made until they took so long: some periods of a processor that is shared out in slices."""

CLOSING = "loss"
"""Kind of what follows the last call."""
GoOn = Callable[[bool], bool]
"""Called before each pass, with whether this worker would make one more: what all of them do, once all have called."""


def wants_more(number: int, taken_s: float, budget_s: float) -> bool:
    """Whether a measurement is repeated once more, after `number` times in `taken_s`."""
    if number < FEWEST:
        return True
    return taken_s < (budget_s if number < MOST else min(budget_s, LEAST_S))


def without_node(tensor: torch.Tensor) -> torch.Tensor:
    """What a hook may give back for `tensor`, which is saved for a backward pass.

    An operation often saves its own result, which holds on to the operation: nothing could free either any more, nor
    the whole graph before it, as the collector does not see through torch's.
    """
    return tensor if tensor.is_leaf else tensor.detach()


@dataclasses.dataclass
class Timing:
    """Passes of one size: of each pass the seconds of each call, without those spent waiting for other workers."""

    forward_s: list[list[float]] = dataclasses.field(default_factory=list)
    backward_s: list[list[float]] = dataclasses.field(default_factory=list)
    whole_s: list[float] = dataclasses.field(default_factory=list)

    def sum_of_medians_s(self) -> float:
        """Of all calls, forward and backward."""
        passes = (self.forward_s, self.backward_s)
        return float(sum(median(call) for seconds in passes for call in zip(*seconds, strict=True)))


@dataclasses.dataclass
class Call:
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
    crossing_bytes: float = 0.0
    """What would cross a cut after it; see `Crossing`."""
    channels: tuple[int, ...] = ()
    """Of its batch norms, in all: they take statistics over all workers, and exchange them."""
    peak_bytes: float = 0.0
    """Temporaries, where they were measured call by call."""


@dataclasses.dataclass(frozen=True)
class _Moment:
    """What has been done until a moment."""

    at_s: float
    waited_s: float
    num_exchanges: int
    mark: Mark

    def work_s(self, before: _Moment) -> float:
        """Since `before`, other than waiting."""
        return max(0.0, self.at_s - before.at_s - (self.waited_s - before.waited_s))

    def since(self, first: _Moment) -> _Moment:
        """With the time that has passed on the device since `first`; both have come to pass."""
        return dataclasses.replace(self, at_s=DeviceClock.seconds(first.mark, self.mark))


class Passes:
    """Forward and backward passes of a replica's model, whole or divided by tensor parallelism."""

    def __init__(
        self,
        job: Job,
        replica: Replica,
        device: torch.device,
        among: Group | None = None,
        stand_in: Callable[[int, Any, Any], Any] | None = None,
    ) -> None:
        """
        Args:
            among: the workers with which the pieces exchange something; None: with none.
            stand_in: gives the results of a call, from its number and arguments: only what is around the calls is
                computed. None: the calls are.
        """
        self._job, self._replica, self._model, self._device = job, replica, replica.model, device
        parts = replica.parts
        self._calls = PieceCalls(self._model, find_pieces(self._model)) if parts is None else parts.calls
        self._clock = DeviceClock(device)
        self._among = among
        self._stand_in = stand_in
        self._exchanges: list[tuple[str, float]] = []
        self._inputs_alone = False

    def measure(self, batch: Any, budget_s: float, go_on: GoOn) -> Timing:
        """Pass after pass over one batch, for about `budget_s`."""
        timing = Timing()
        self._timed(batch)  # warms up
        begin_s = time.perf_counter()
        while go_on(wants_more(len(timing.whole_s), time.perf_counter() - begin_s, budget_s)):
            forward, backward = self._timed(batch)
            timing.forward_s.append([b.work_s(a) for a, b in itertools.pairwise(forward)])
            timing.backward_s.append([b.work_s(a) for a, b in itertools.pairwise(backward)][::-1])
            timing.whole_s.append(sum(timing.forward_s[-1]) + sum(timing.backward_s[-1]))
        return timing

    def measure_inputs(self, batch: Any, budget_s: float, go_on: GoOn) -> Timing | None:
        """`measure` with gradients of inputs alone: those of the weights are not computed.

        Of the first call nothing is left of its backward pass. None where what it returns cannot have a gradient, so
        that there is no backward pass at all, and where the model does not run so: it need not.
        """
        trained = [p for p in self._model.parameters() if p.requires_grad]
        self._inputs_alone = True
        try:
            for parameter in trained:
                parameter.requires_grad_(False)
            # All workers find the same: they have the same model.
            return self.measure(batch, budget_s, go_on) if self._has_backward(batch) else None
        except PacelineError:
            raise
        except Exception:
            return None
        finally:
            self._inputs_alone = False
            for parameter in trained:
                parameter.requires_grad_(True)

    def _has_backward(self, batch: Any) -> bool:
        self._calls.on_call = self._let_first_have_gradients()
        try:
            return self._loss(batch).requires_grad
        finally:
            self._calls.on_call = None

    def _let_first_have_gradients(self) -> Callable[[Piece, Callable[..., Any], Any, Any], Any]:
        """What stands in for the calls: what the first returns has gradients, though its weights have none."""
        seen: list[Piece] = []

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            outputs = forward(*args, **kwargs)
            if not seen:
                for tensor in tensors_in(outputs):
                    if tensor.is_leaf and tensor.is_floating_point():
                        tensor.requires_grad_(True)
            seen.append(piece)
            return outputs

        return call

    def exchanges(self, batch: Any) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
        """Of each call what it exchanges in its forward and in its backward pass: collectives and their bytes."""
        assert self._among is not None
        with _noting(self._among, self._exchanges):
            forward, backward = self._timed(batch)

        def between(moments: list[_Moment]) -> list[list[tuple[str, float]]]:
            return [
                self._exchanges[a.num_exchanges : b.num_exchanges] for a, b in itertools.pairwise(moments)
            ]

        found = list(zip(between(forward), between(backward)[::-1], strict=True))
        self._exchanges.clear()
        return found

    def _timed(self, batch: Any) -> tuple[list[_Moment], list[_Moment]]:
        """The moments between the calls, in the order in which they come; what follows the last call is a call too."""
        ends: list[_Moment] = []
        came: list[_Moment | None] = []
        run = self._let_first_have_gradients() if self._inputs_alone else None

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            number = len(came)
            stand_in = self._stand_in
            if run is not None:
                outputs = run(piece, forward, args, kwargs)
            else:
                outputs = forward(*args, **kwargs) if stand_in is None else stand_in(number, args, kwargs)
            ends.append(self._now())
            came.append(None)
            for tensor in tensors_in(outputs):
                if tensor.requires_grad and (run is not None or not tensor.is_leaf):
                    tensor.register_hook(lambda gradient: note(number))
            return outputs

        def note(number: int) -> None:
            came[number] = self._now()

        self._calls.on_call = call
        try:
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            begin = self._now()
            loss = self._loss(batch)
            forward = [begin, *ends, self._now()]
            loss.backward()
            end = self._now()
        finally:
            self._calls.on_call = None
            self._model.zero_grad(set_to_none=True)
        if not self._clock.is_callers:
            came = [moment and moment.since(begin) for moment in came]
            *forward, end = (moment.since(begin) for moment in (*forward, end))
        # Backward, from the last call to the first; a gradient that is not seen, or comes early, takes no time.
        backward = [forward[-1]]
        for moment in reversed(came):
            before = backward[-1]
            backward.append(before if moment is None or moment.at_s < before.at_s else moment)
        return forward, [*backward, end]

    def describe(self, batch: Any, samples: int) -> list[Call]:
        """What each call holds; and, last, what is around them."""
        found: list[Call] = []
        parameters = {p.untyped_storage().data_ptr() for p in self._model.parameters()}
        counted: set[int] = set()
        stored: set[int] = set(parameters)

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            before = len(saved)
            outputs = forward(*args, **kwargs)
            with plainly():  # what tensor parallelism has divided seems whole otherwise
                found.append(describe_call(piece, args, kwargs, outputs, sum(saved[before:])))
                return crossing.called((args, kwargs), outputs)

        def describe_call(piece: Piece, args: Any, kwargs: Any, outputs: Any, saved_bytes: int) -> Call:
            own = [p for p in piece.module.parameters() if id(p) not in counted]
            counted.update(map(id, own))
            shapes = tuple((p.shape, p.dtype, p.requires_grad) for p in own)
            input_bytes = sum(t.nbytes for t in tensors_in((args, kwargs)) if t.data_ptr() not in parameters)
            output_bytes = sum(t.nbytes for t in tensors_in(outputs))
            return Call(
                name=piece.name,
                kind=(type(piece.module), shapes, input_bytes, output_bytes),
                parameter_bytes=sum(p.nbytes for p in own),
                trained_bytes=sum(p.nbytes for p in own if p.requires_grad),
                saved_bytes=saved_bytes / samples,
                input_bytes=input_bytes / samples,
                output_bytes=output_bytes / samples,
                channels=tuple(m.num_features for m in piece.module.modules() if isinstance(m, _BatchNorm)),
            )

        saved: list[int] = []

        def keep(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in stored:
                stored.add(storage.data_ptr())
                saved.append(storage.nbytes())
            return without_node(tensor)

        crossing = Crossing(lambda: self._calls.is_inside)
        self._calls.on_call = call
        try:
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), crossing:
                loss = self._loss(batch, crossing.returned)
        finally:
            self._calls.on_call = None
        for described, num_bytes in zip(found, crossing.bytes_after(), strict=True):
            described.crossing_bytes = num_bytes / samples
        around = [p for p in self._model.parameters() if id(p) not in counted]
        within = sum(call.saved_bytes for call in found)
        found.append(
            Call(
                name="loss",
                kind=CLOSING,
                parameter_bytes=sum(p.nbytes for p in around),
                trained_bytes=sum(p.nbytes for p in around if p.requires_grad),
                saved_bytes=max(0.0, sum(saved) / samples - within),
                input_bytes=found[-1].output_bytes if found else 0.0,
                output_bytes=0.0,
            )
        )
        del loss
        return found

    def _loss(self, batch: Any, see: Callable[[Any], Any] = lambda outputs: outputs) -> torch.Tensor:
        batch = self._replica.images.arrange(batch)
        with self._replica.forward_context():
            loss: Any = self._job.loss(see(self._replica.call(batch)), batch)
        whole: torch.Tensor = loss[0] / loss[1] if isinstance(loss, tuple) else loss
        return whole

    def _now(self) -> _Moment:
        waited_s = 0.0 if self._among is None else self._among.waited_s
        return _Moment(time.perf_counter(), waited_s, len(self._exchanges), self._clock.mark())


@contextlib.contextmanager
def _noting(group: Group, found: list[tuple[str, float]]) -> Iterator[None]:
    """Note the collectives of a group: kind and bytes, of an all-gather what it gives."""

    def noted(kind: str, times: int, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            found.append((kind, float(tensor.nbytes * times)))
            return function(tensor, *args, **kwargs)

        return call

    kinds = {
        "sum_": ("all-reduce", 1),
        "all_gather_": ("all-gather", 1),
        "reduce_scatter_": ("reduce-scatter", 1),
        "gather": ("all-gather", group.size),
    }
    for name, (kind, times) in kinds.items():
        setattr(group, name, noted(kind, times, getattr(group, name)))
    try:
        yield
    finally:
        for name in kinds:
            delattr(group, name)
