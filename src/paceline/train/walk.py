"""A forward of a job's model in which no more than one piece has its values: what each call is given, gives and holds.

Each piece computes with what the pieces before it really gave, so that inputs have realistic values; its graph is
dropped with its parameters when it has ended. The first call of each kind is kept, to be measured alone.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from paceline.errors import JobError
from paceline.job import Job
from paceline.split.crossing import Crossing
from paceline.split.pieces import Piece, find_pieces
from paceline.split.stages import PieceCalls
from paceline.split.tensor_mode import plainly
from paceline.split.trees import flatten, map_tensors, tensors_in
from paceline.train.holding import Holding, Reads
from paceline.train.passes import Call
from paceline.train.replica import Replica
from paceline.train.work import Work

Restore = Callable[[list[Any]], Any]


@dataclasses.dataclass(frozen=True)
class _Kept:
    """A tensor without its history."""

    tensor: torch.Tensor
    requires_grad: bool

    def begin(self) -> torch.Tensor:
        """The same memory, in the same place of a new graph."""
        return begin(self.tensor) if self.requires_grad else self.tensor


@dataclasses.dataclass(frozen=True)
class _Given:
    """A result that is an argument, handed through."""

    number: int


@dataclasses.dataclass(frozen=True)
class _Values:
    """Arguments or results of a call."""

    leaves: list[Any]
    restore: Restore

    def begin(self, given: list[Any] | None = None) -> Any:
        """As the call has them, tensors at the beginning of a new graph; what is no tensor as it was before the call.

        Args:
            given: the call's arguments, flat, where these are its results.
        """

        def again(leaf: Any) -> Any:
            if isinstance(leaf, _Kept):
                return leaf.begin()
            if isinstance(leaf, _Given):
                assert given is not None
                return given[leaf.number]
            # A cache, say, that grows with each call.
            return leaf if isinstance(leaf, torch.Tensor) else copy.deepcopy(leaf)

        return self.restore([again(leaf) for leaf in self.leaves])


@dataclasses.dataclass
class Unit:
    """A call that stands for all of its kind."""

    number: int
    """Of the call, in the model's order."""
    piece: Piece
    forward: Callable[..., Any]
    own: list[nn.Parameter]
    """Those of its parameters that no earlier call has."""
    read: list[nn.Parameter]
    """The parameters that it needs."""
    arguments: dict[int, _Values] = dataclasses.field(default_factory=dict)
    """By samples; likewise below."""
    results: dict[int, _Values] = dataclasses.field(default_factory=dict)

    def compute(self, samples: int, count: Callable[[], tuple[int, int]]) -> tuple[int, int]:
        """What `count` counts in a forward pass of it alone. It has the parameters that it reads."""
        args, kwargs = map_tensors(self.arguments[samples].begin(), torch.Tensor.detach)
        before = count()
        with torch.no_grad():
            self.forward(*args, **kwargs)
        return _difference(count(), before)


class Walk:
    """Forwards of one model, whose parameters may be deferred."""

    def __init__(self, job: Job, replica: Replica) -> None:
        self._job, self._replica, self._deferred = job, replica, replica.deferred
        self._calls = PieceCalls(replica.model, find_pieces(replica.model))
        self._parameters = {p.untyped_storage()._cdata: p for p in replica.model.parameters()}
        """By the address of their memory, which stays while that is given back."""
        self.units: list[Unit] = []
        self.row: list[int] = []
        """Of each call its unit."""
        self.calls: list[Call] = []
        """What each call holds; and, last, what is around them."""
        self.work: list[tuple[int, int]] = []
        """The same of what they compute, as `count_work` gives it; filling what is read between them is counted too."""
        self.around: list[nn.Parameter] = []
        """The parameters that no call has."""
        self.between: list[nn.Parameter] = []
        """Those that are read between the calls."""

    def first(self, batch: Any, samples: int) -> None:
        """Find out what there is, with the largest batch.

        Raises:
            JobError: the model calls no module that could be measured alone.
        """
        reads, holding = Reads(), Holding(self._parameters)
        counted: set[int] = set()
        kinds: dict[Any, int] = {}
        found: list[tuple[int, int]] = []
        computed: list[tuple[int, int]] = []
        with Work() as work:
            marks = [(0, 0)]

            def count() -> tuple[int, int]:
                return work.flops, work.operations

            def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
                beside = _difference(count(), marks[-1])
                with self._deferred.filled(piece.module.parameters()):
                    with reads.within(), holding.call():
                        outputs = map_tensors(forward(*args, **kwargs), self._apart)
                    own = [p for p in piece.module.parameters() if id(p) not in counted]
                    counted.update(map(id, own))
                    about = holding.describe(piece, own, args, kwargs, outputs, samples)
                    is_new = about.kind not in kinds
                    if is_new:
                        kinds[about.kind] = len(self.units)
                        read = [*piece.module.parameters(), *self._seen_through(args, kwargs), *reads.inside]
                        self.units.append(Unit(len(self.row), piece, forward, own, _distinct(read)))
                    self.row.append(kinds[about.kind])
                    self.calls.append(about)
                    result = self._hand_on(len(self.row) - 1, samples, args, kwargs, outputs)
                    crossing.called((args, kwargs), result)
                    if is_new:
                        with reads.within():
                            computed.append(self.units[-1].compute(samples, count))
                work_of_kind = computed[self.row[-1]]
                found.append((beside[0] + work_of_kind[0], beside[1] + work_of_kind[1]))
                marks.append(count())
                return result

            crossing = Crossing(lambda: self._calls.is_inside)
            with holding.hooks(), reads, crossing:
                self._run(batch, call, crossing.returned)
            for described, num_bytes in zip(self.calls, crossing.bytes_after(), strict=True):
                described.crossing_bytes = num_bytes / samples
            found.append(_difference(count(), marks[-1]))
        if not self.units:
            raise JobError(
                "the model calls none of its modules: it cannot be measured block by block",
                cause="its parameters are read by the forward of the model itself",
                next_step="put its layers into modules, or use a host with memory for all of it",
            )
        self.work = found
        self.around = [p for p in self._replica.model.parameters() if id(p) not in counted]
        self.between = _distinct(reads.between)
        self.calls.append(holding.rest(self.around, self.calls, samples))

    def again(self, batch: Any, samples: int) -> None:
        """Have the arguments and results of each unit with another number of samples.

        Raises:
            JobError: it calls its pieces otherwise.
        """
        number = 0
        others = False

        def call(piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
            nonlocal number, others
            others |= number >= len(self.row) or self.calls[number].name != piece.name
            with self._deferred.filled(piece.module.parameters()):
                outputs = map_tensors(forward(*args, **kwargs), self._apart)
            result = self._hand_on(number, samples, args, kwargs, outputs)
            number += 1
            return result

        self._run(batch, call)
        if others or number != len(self.row):
            how = "others" if number == len(self.row) else f"{number}"
            raise JobError(
                f"the model calls {len(self.row)} of its blocks for one batch, and {how} for another: it cannot be "
                "measured block by block",
                cause="which of them it calls depends on its inputs",
                next_step="use a host with memory for the whole model, or give --layout",
            )

    def stand_in(self, number: int, samples: int, args: Any, kwargs: Any) -> Any:
        """Results of a call, without computing it."""
        results = self.units[self.row[number]].results[samples]
        return results.begin(flatten((args, kwargs))[0])

    def _run(
        self,
        batch: Any,
        call: Callable[[Piece, Callable[..., Any], Any, Any], Any],
        see: Callable[[Any], Any] = lambda outputs: outputs,
    ) -> None:
        self._calls.on_call = call
        try:
            with self._deferred.lending(), self._replica.forward_context():
                batch = self._replica.images.arrange(batch)
                self._job.loss(see(self._replica.call(batch)), batch)
        finally:
            self._calls.on_call = None

    def _apart(self, tensor: torch.Tensor) -> torch.Tensor:
        """A result that looks into a parameter stays when that has no values any more."""
        return tensor.clone() if tensor.untyped_storage()._cdata in self._parameters else tensor

    def _seen_through(self, args: Any, kwargs: Any) -> list[nn.Parameter]:
        """Parameters among the arguments, themselves or seen through another tensor."""
        addresses = [t.untyped_storage()._cdata for t in tensors_in((args, kwargs))]
        return [self._parameters[at] for at in addresses if at in self._parameters]

    def _hand_on(self, number: int, samples: int, args: Any, kwargs: Any, outputs: Any) -> Any:
        """The results without the graph that they come from; arguments and results are kept, if they are a unit's."""
        # It has copies of parameters, in another type.
        torch.clear_autocast_cache()
        given, restore = flatten((args, kwargs))
        results, rebuild = flatten(outputs)
        places = {id(leaf): at for at, leaf in enumerate(given) if isinstance(leaf, torch.Tensor)}
        with plainly():
            kept = _Values([_Given(places[id(r)]) if id(r) in places else _keep(r) for r in results], rebuild)
            if number < len(self.row) and (unit := self.units[self.row[number]]).number == number:
                unit.arguments[samples] = _Values([_keep(leaf) for leaf in given], restore)
                unit.results[samples] = kept
            # What is no tensor is handed on as it is.
            leaves = [
                given[leaf.number]
                if isinstance(leaf, _Given)
                else leaf.begin()
                if isinstance(leaf, _Kept)
                else leaf
                for leaf in kept.leaves
            ]
        return rebuild(leaves)


class _Begin(torch.autograd.Function):
    """Gives a tensor a history that ends here, and no memory of its own: code may change it in place."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
        new = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
        return new.set_(tensor.untyped_storage(), tensor.storage_offset(), tensor.shape, tensor.stride())

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return None, None


def begin(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor at the beginning of a graph, not as a leaf: its gradient is computed, and not kept."""
    started: torch.Tensor = _Begin.apply(torch.zeros((), device=tensor.device, requires_grad=True), tensor)
    return started


def _keep(leaf: Any) -> Any:
    if not isinstance(leaf, torch.Tensor) or isinstance(leaf, nn.Parameter):
        return leaf
    return _Kept(leaf.detach(), leaf.requires_grad)


def _difference(after: tuple[int, int], before: tuple[int, int]) -> tuple[int, int]:
    return after[0] - before[0], after[1] - before[1]


def _distinct(parameters: list[nn.Parameter]) -> list[nn.Parameter]:
    return list({id(p): p for p in parameters}.values())
