"""Where a model can be split: found by rank 0 from forwards on small batches, told to all workers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import nn

from paceline import errors
from paceline.comm.group import Group
from paceline.errors import PacelineError, SplitError
from paceline.records import Layout
from paceline.split.placement import Shard
from paceline.split.stages import CutBy, PieceCalls, Stages, plan_stages, steady_pieces
from paceline.split.tensor_mode import shard_of
from paceline.split.tensor_plan import plan_tensor_split
from paceline.split.trees import flatten

Run = Callable[[], Any]


@dataclasses.dataclass(frozen=True)
class TensorSplit:
    """What tensor parallelism divides."""

    shards: Mapping[str, Shard]
    """By the names of the parameters."""
    given: Mapping[tuple[str, int], tuple[Shard | None, ...]]
    """How the arguments of a call of a piece, flat, are divided: (name of the piece, number of the call)."""
    by_position: bool
    """Whether what is between the divided layers is divided along positions."""


@dataclasses.dataclass(frozen=True)
class Found:
    """Where a model is split: what one worker found out, and all keep to. Proof and training share it."""

    steady: frozenset[str] = frozenset()
    """Names of the pieces that all workers call alike, whatever their samples."""
    read_between: frozenset[str] = frozenset()
    """Names of the parameters that are read between the pieces."""
    tensor: TensorSplit | None = None
    left_whole: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Pieces that could have been divided and were not, and why."""
    stages: Stages | None = None
    why_cut_so: str = ""
    """Why stages are not cut as planned, or by the times of a small batch where one of a micro-batch's size had been
    put together: in a sentence."""


def agree(group: Group, what: str, function: Callable[[], Any]) -> Any:
    """What rank 0 finds out, in JSON, on every worker; and what goes wrong there does so everywhere.

    Raises:
        PacelineError: of the kind that `function` raised.
        RuntimeError: it raised something else.
    """
    told: dict[str, Any] = {}
    raised: Exception | None = None
    if group.rank == 0:
        try:
            told = {"found": function()}
        except PacelineError as error:
            raised = error
            told = {"kind": type(error).__name__, "error": [error.what, error.cause, error.next_step]}
        except Exception as error:
            raised = error
            told = {"failed": f"{type(error).__name__}: {error}"}
    told = group.gather_json(told, what)[0]
    if raised is not None:
        raise raised
    if "kind" in told:
        text, cause, next_step = told["error"]
        kind = getattr(errors, told["kind"])
        raise kind(text, cause=cause, next_step=next_step)
    if "failed" in told:
        raise RuntimeError(told["failed"])
    return told["found"]


def find_steady(
    group: Group, model: nn.Module, calls: PieceCalls, runs: Sequence[Run]
) -> tuple[frozenset[str], frozenset[str]]:
    """Names of the pieces that all `runs` call alike, and of the parameters that are read between pieces."""

    def find() -> list[list[str]]:
        pieces, read_between = steady_pieces(model, calls, runs)
        return [[piece.name for piece in pieces], sorted(read_between)]

    steady, read_between = agree(group, "pieces of the model", find)
    return frozenset(steady), frozenset(read_between)


def find_stages(
    group: Group,
    model: nn.Module,
    calls: PieceCalls,
    small: Run,
    workers: Sequence[int],
    by: CutBy,
) -> tuple[Stages, str]:
    """Where to cut the model, and in a sentence why it is not as planned, or not by the times of a micro-batch, if that
    was to be expected. See `plan_stages`.

    Args:
        small: a forward of a small batch; the model may not take one that is made of several.
        workers: of each stage, who computes it.
    """
    speeds = by.speeds_of(workers)

    def plan(run: Run) -> Stages:
        how: dict[str, Any] = {"room": by.room, "speeds": speeds, "cuts": by.cuts}
        return plan_stages(model, calls, run, len(workers), **how)

    def timed() -> tuple[Stages, str]:
        if by.timed is None:
            return plan(small), ""
        try:
            return plan(by.timed), ""
        except PacelineError:
            raise
        except Exception as error:
            told = f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"
            why = "Stages were cut by the times of a small batch, not a micro-batch's: "
            return plan(small), f"{why}the model does not take small ones put together: {told}."

    def find() -> tuple[dict[str, Any], str]:
        if not by.cuts:
            stages, why = timed()
            return stages.to_json(), why
        # Nothing has to be timed: of a small batch the model calls the same.
        stages, also = plan(small), ""
        if not by.is_kept_to(stages):
            stages, also = timed()
        if by.is_kept_to(stages):
            return stages.to_json(), ""
        why = (
            f"Stages were not cut as planned: the plan cuts {by.cuts[-1]} pieces into {len(by.cuts) - 1} stages, and "
            f"the model calls {len(stages.calls)}, for {stages.num_stages}. Measure the job again. {also}"
        )
        return stages.to_json(), why.strip()

    stages, why_cut_so = agree(group, "the pipeline's stages", find)
    return Stages.from_json(stages), why_cut_so


def find_tensor_split(
    group: Group,
    model: nn.Module,
    calls: PieceCalls,
    run: Run,
    layout: Layout,
    left_whole: Collection[str],
    growth: float,
) -> TensorSplit:
    """What to divide by `layout.tp`.

    Args:
        growth: how many times larger than the run's batch a worker's micro-batch is.

    Raises:
        SplitError: there is nothing.
    """

    def find() -> list[Any]:
        passes: list[dict[tuple[str, int], list[Any]]] = []

        def note(piece: Any, forward: Any, args: Any, kwargs: Any) -> Any:
            number = sum(name == piece.name for name, _ in passes[-1])
            passes[-1][piece.name, number] = [_to_json(shard_of(leaf)) for leaf in flatten((args, kwargs))[0]]
            return forward(*args, **kwargs)

        def noted_run() -> None:
            passes.append({})
            run()

        calls.on_call = note
        try:
            shards, by_position = plan_tensor_split(
                model, noted_run, layout.tp, left_whole, sequence=layout.sequence, growth=growth
            )
        finally:
            calls.on_call = None
        if not shards:
            raise SplitError(
                f"nothing in the model can be divided by tp={layout.tp}",
                cause="it divides linear layers, embeddings and convolutions whose sizes are multiples of tp",
                next_step=_nearest_tp(model, run, layout.tp),
            )
        given = passes[-1 if by_position else -2]
        return [
            [[name, _to_json(shard)] for name, shard in shards.items()],
            [[*key, value] for key, value in given.items()],
            by_position,
        ]

    shards, given, by_position = agree(group, "the tensor split", find)
    return TensorSplit(
        {name: _from_json(shard) for name, shard in shards},  # type: ignore[misc]
        {(name, number): tuple(map(_from_json, value)) for name, number, value in given},
        by_position,
    )


def _to_json(shard: Shard | None) -> Any:
    return None if shard is None else [shard.dim, list(shard.parts)]


def _from_json(value: Any) -> Shard | None:
    return None if value is None else Shard(value[0], tuple(value[1]))


def _nearest_tp(model: nn.Module, run: Run, wanted: int) -> str:
    for other in sorted(range(2, 2 * wanted + 1), key=lambda n: (abs(n - wanted), n)):
        if other != wanted and plan_tensor_split(model, run, other)[0]:
            return f"use tp={other}, or another axis (dp_shard, pp)"
    return "use another axis (dp_shard, pp)"
