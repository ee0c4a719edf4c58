"""Cutting a model into pipeline stages: which piece is computed where.

The model's forward runs, whole, and the row of its calls of pieces is cut as the planner has it. Where that knows
nothing of the model the forward has as many samples as a micro-batch, each call is timed, in the order of the program,
and the row is cut where the slowest stage is fastest, or hardly slower, if that sends less; where memory may be short,
of those cuts in which no stage has over a tenth more parameters than it must. Workers on faster hosts get more of the
row. A piece that is called several times may fall into several stages; each of them then has its parameters, as has
each stage that reads a parameter between the pieces.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.errors import LayoutError
from paceline.plan.cuts import partition, uneven
from paceline.split.crossing import Crossing
from paceline.split.pieces import Piece
from paceline.split.tensor_mode import run_whole
from paceline.split.tensor_plan import undisturbed
from paceline.split.trees import tensors_in


@dataclasses.dataclass(frozen=True)
class Stages:
    """Where everything is computed. Stages are counted along the model; one worker may have several."""

    num_stages: int
    calls: Mapping[tuple[str, int], int]
    """(name of a piece, number of the call) -> stage."""
    holders: Mapping[str, tuple[int, ...]]
    """Name of a parameter -> the stages that have it, ascending."""

    def to_json(self) -> dict[str, Any]:
        return {
            "num_stages": self.num_stages,
            "calls": [[name, number, stage] for (name, number), stage in self.calls.items()],
            "holders": {name: list(stages) for name, stages in self.holders.items()},
        }

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Stages:
        return cls(
            data["num_stages"],
            {(name, number): stage for name, number, stage in data["calls"]},
            {name: tuple(stages) for name, stages in data["holders"].items()},
        )


@dataclasses.dataclass(frozen=True)
class CutBy:
    """By what a pipeline's stages are cut."""

    timed: Callable[[], Any] | None = None
    """A forward of a batch as large as a micro-batch; where there is none, or it fails, a small one is taken."""
    room: float = 0.0
    """Parameters that a stage may have, whatever the others have."""
    speeds: tuple[float, ...] = ()
    """Of each worker of the pipeline; empty: all alike."""
    cuts: tuple[int, ...] = ()
    """Where each stage begins in the row of calls, and their number, as the planner cuts it; empty: it is not known."""

    def is_kept_to(self, stages: Stages) -> bool:
        """Whether these stages are the planner's: it knows as many calls as the model makes."""
        return len(self.cuts) == stages.num_stages + 1 and self.cuts[-1] == len(stages.calls)

    def speeds_of(self, workers: Sequence[int]) -> tuple[float, ...]:
        """Of each stage, whose worker is given."""
        return tuple(self.speeds[worker] for worker in workers) if self.speeds else ()


class PieceCalls:
    """Lets the calls of a model's pieces be seen: `on_call(piece, forward, args, kwargs)` stands in for them.

    Where it is None, `compute` does.
    """

    def __init__(self, model: nn.Module, pieces: Sequence[Piece]) -> None:
        self.on_call: Callable[[Piece, Callable[..., Any], Any, Any], Any] | None = None
        self.compute: Callable[[Piece, Callable[..., Any], Any, Any], Any] | None = None
        self.around: Callable[[Piece], contextlib.AbstractContextManager[None]] | None = None
        """What every piece is called in."""
        self.undivided: frozenset[str] = frozenset()
        """Names of pieces that tensor parallelism does not look into: they compute on whole tensors."""
        self.pieces = list(pieces)
        self._is_inside = False
        for piece in pieces:
            piece.module.forward = self._standing_in(piece, piece.module.forward)

    def _standing_in(self, piece: Piece, forward: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(forward)
        def inside(*args: Any, **kwargs: Any) -> Any:
            self._is_inside = True
            try:
                if piece.name in self.undivided:
                    return run_whole(forward, args, kwargs)
                return forward(*args, **kwargs)
            finally:
                self._is_inside = False

        @functools.wraps(forward)
        def called(*args: Any, **kwargs: Any) -> Any:
            if self._is_inside:
                return forward(*args, **kwargs)
            stand_in = self.on_call or self.compute
            with contextlib.nullcontext() if self.around is None else self.around(piece):
                return inside(*args, **kwargs) if stand_in is None else stand_in(piece, inside, args, kwargs)

        return called

    @property
    def is_inside(self) -> bool:
        """Whether a piece is being computed."""
        return self._is_inside


class _Trace(Crossing):
    """Follows one forward: how long each call of a piece takes, and which parameters are read between them."""

    def __init__(self, calls: PieceCalls, names: Mapping[int, str]) -> None:
        super().__init__(lambda: calls.is_inside)
        self._names = names
        self.seen: list[tuple[str, int]] = []
        self.seconds: list[float] = []
        self.shapes: list[tuple[torch.Size, ...]] = []
        """Of each call's arguments: the same layer may be called on much and on little."""
        self.beside: dict[str, set[int]] = {}
        """Name of a parameter -> numbers of the calls beside which it is read."""
        self._counts: dict[str, int] = {}

    def read_between(self, parameters: Sequence[torch.Tensor], number: int) -> None:
        for parameter in parameters:
            if id(parameter) in self._names:
                self.beside.setdefault(self._names[id(parameter)], set()).add(number)

    def call(self, piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        number = self._counts.get(piece.name, 0)
        self._counts[piece.name] = number + 1
        given = tensors_in((args, kwargs))
        device = given[0].device if given else torch.device("cpu")
        begin_s = _worked_s(device)
        result = forward(*args, **kwargs)
        self.seconds.append(_worked_s(device) - begin_s)
        self.seen.append((piece.name, number))
        self.shapes.append(tuple(t.shape for t in given))
        self.read_between(given, len(self.seen) - 1)
        return self.called((args, kwargs), result)


def _worked_s(device: torch.device) -> float:
    """A clock of what the device has worked.

    On a CPU processor time: a process that has to stop now and then would be cut anywhere. Another device works on
    after a call has returned.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        return time.perf_counter()
    return time.process_time()


def steady_pieces(
    model: nn.Module, calls: PieceCalls, runs: Sequence[Callable[[], Any]]
) -> tuple[list[Piece], set[str]]:
    """The pieces that every one of `runs`, forwards on different samples, calls equally often, and at least once.

    Others are called for some samples only (experts that a loop in the model chooses): workers would not agree on them.

    Returns:
        The pieces, and the names of the parameters that are read between pieces too.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    traces = [_follow(model, calls, run, names) for run in runs]
    counts = [collections.Counter(name for name, _ in trace.seen) for trace in traces]
    steady = [p for p in calls.pieces if counts[0][p.name] and len({c[p.name] for c in counts}) == 1]
    return steady, {name for trace in traces for name in trace.beside}


def _follow(model: nn.Module, calls: PieceCalls, run: Callable[[], Any], names: Mapping[int, str]) -> _Trace:
    trace = _Trace(calls, names)
    calls.on_call = trace.call
    try:
        with undisturbed(model), trace, torch.no_grad():
            trace.returned(run())
    finally:
        calls.on_call = None
    return trace


def plan_stages(
    model: nn.Module,
    calls: PieceCalls,
    run: Callable[[], Any],
    num_stages: int,
    *,
    room: float = 0.0,
    speeds: Sequence[float] = (),
    cuts: Sequence[int] = (),
) -> Stages:
    """Where to compute what, in `num_stages` stages of about equal time, and of about equal size where that is needed.

    Args:
        run: one forward of the model; without `cuts` of as many samples as a micro-batch has: of few, small blocks
            seem large.
        room: as of `CutBy`.
        speeds: of who computes each stage; empty: all alike.
        cuts: as of `CutBy`; kept to if the model has as many calls: there is room for what is planned.

    Raises:
        LayoutError: the model has fewer pieces than stages.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    trace = _follow(model, calls, run, names)
    if len(trace.seen) < num_stages:
        raise LayoutError(
            f"the model has {len(trace.seen)} pieces to cut between, and {num_stages} pipeline stages were asked for",
            cause="a stage needs at least one piece: a block of a list, or a module that the model calls",
            next_step=f"use at most pp={len(trace.seen)}" if len(trace.seen) > 1 else "use another axis",
        )
    modules = {piece.name: piece.module for piece in calls.pieces}
    elements = [float(sum(p.numel() for p in modules[name].parameters())) for name, _ in trace.seen]
    if len(cuts) == num_stages + 1 and cuts[-1] == len(elements):
        stage_of = _stage_of_each(cuts)
    else:
        kinds = [
            (_kind(modules[name]), shapes) for (name, _), shapes in zip(trace.seen, trace.shapes, strict=True)
        ]
        key = torch.get_num_threads(), tuple(kinds)
        seconds = _seconds_of(key, trace.seconds, lambda: _follow(model, calls, run, names).seconds)
        seconds = _alike(seconds, kinds)
        stage_of = cut_in_balance(seconds, elements, num_stages, room, trace.bytes_after(), speeds)
    where = dict(zip(trace.seen, stage_of, strict=True))
    holders: dict[str, set[int]] = {}
    by_id = {id(p): name for name, p in model.named_parameters()}
    for (name, _), stage in where.items():
        for parameter in modules[name].parameters():
            holders.setdefault(by_id[id(parameter)], set()).add(stage)
    for name, numbers in trace.beside.items():
        holders.setdefault(name, set()).update(stage_of[min(n, len(stage_of) - 1)] for n in numbers)
    for name in by_id.values():
        # One that nothing reads is kept somewhere.
        holders.setdefault(name, {0})
    return Stages(num_stages, where, {n: tuple(sorted(s)) for n, s in holders.items()})


def _kind(module: nn.Module) -> Any:
    """Equal for repeated blocks."""
    return type(module), tuple((name, p.shape, p.dtype, p.device) for name, p in module.named_parameters())


def _alike(seconds: Sequence[float], kinds: Sequence[Any]) -> list[float]:
    """For each call the median of those of its kind: a block that was held up is no slower than its like."""
    by_kind: dict[Any, list[float]] = {}
    for cost, kind in zip(seconds, kinds, strict=True):
        by_kind.setdefault(kind, []).append(cost)
    return [statistics.median(by_kind[kind]) for kind in kinds]


_known_s: dict[Any, list[float]] = {}
"""Seconds of each call of a model, by what is called on what. A model is built and cut anew for each layout that is
tried, and once more to be trained: where two cuts are nearly as fast all of these are to take the same."""


def _seconds_of(key: Any, first: Sequence[float], again: Callable[[], Sequence[float]]) -> list[float]:
    """The quickest of some times, found once in a process.

    Args:
        first, again: seconds of one forward, and of another.
    """
    if key not in _known_s:
        rows = [first, *(again() for _ in range(_ROUNDS - 1))]
        _known_s[key] = [min(seconds) for seconds in zip(*rows, strict=False)]
    return _known_s[key]


_ROUNDS = 5
"""Forwards of which each call's quickest counts."""
_SIZE_TO_SPARE = 1.1
"""A stage may be so many times larger than the largest must be, if that saves time."""


def cut_in_balance(
    seconds: Sequence[float],
    sizes: Sequence[float],
    num_parts: int,
    room: float = 0.0,
    sends: Sequence[float] = (),
    speeds: Sequence[float] = (),
) -> list[int]:
    """The part of each call, in order, none empty: the quickest of those that are hardly larger than they must be, or
    no larger than `room`; of those that are hardly slower the one that sends least.

    Where most of the weights are in one place (an embedding) the others are still cut by time alone.

    Args:
        sends: of each call, what would cross a cut after it.
        speeds: of who computes each part; empty, or where they hardly differ: all alike.
    """
    must = max(sum(sizes[a:b]) for a, b in itertools.pairwise(partition(sizes, num_parts)))
    largest = max(room, _SIZE_TO_SPARE * must)
    bounds = partition(seconds, num_parts, sends=sends, sizes=sizes, largest=largest, speeds=uneven(speeds))
    return _stage_of_each(bounds)


def _stage_of_each(bounds: Sequence[int]) -> list[int]:
    return [part for part, (a, b) in enumerate(itertools.pairwise(bounds)) for _ in range(b - a)]
