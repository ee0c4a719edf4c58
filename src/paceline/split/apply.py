"""Applying a layout to a model, in one fixed order.

1. **Pieces** are found: everything below works piece by piece. Nothing has to be in memory for that: parameters
   may be deferred, and are then lent their values piece by piece.
2. **Pipeline**: parameters of other stages leave. First, as what is not here need not be divided.
3. **Tensor parallelism** divides what is left; it must see whole parameters, and gives plain, smaller ones.
4. **Batch norms** take statistics over the workers among which the batch is split.
5. **Recomputation** wraps each piece; the collectives of tensor parallelism run again within it.
6. **Sharding** lays what is left of each piece end to end and keeps a part of it; last, because it changes where
   parameters live, and because what it gathers is what the others compute with.

After that every parameter that the plan names has been reached, or an error says which was not.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh
from paceline.errors import SplitError
from paceline.plan.schedules import Schedule
from paceline.records import Layout
from paceline.split import rules as rules  # fills the tables of tensor parallelism
from paceline.split.block_proof import find_proven_split
from paceline.split.deferred import DeferredParameters
from paceline.split.exchange import gather_whole
from paceline.split.finding import Found, TensorSplit, find_stages, find_steady
from paceline.split.pieces import Piece, pieces_for
from paceline.split.placement import Shard, take
from paceline.split.recompute import recomputed
from paceline.split.stages import CutBy, PieceCalls
from paceline.split.tensor_parallel import TensorParallel
from paceline.split.tensor_plan import divide_parameters

Cut = Callable[[torch.Tensor], torch.Tensor]


@dataclasses.dataclass
class LocalParameter:
    """What one worker has of a parameter."""

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    """Of the whole."""
    shard: Shard | None
    """How tensor parallelism divided it."""
    holders: tuple[int, ...]
    """The pipeline's workers that have it, ascending."""


class SplitModel:
    """A model of which this worker has a part."""

    def __init__(
        self,
        model: nn.Module,
        layout: Layout,
        mesh: Mesh,
        runs: Sequence[Callable[[], Any]],
        schedule: Schedule | None,
        deferred: DeferredParameters,
        *,
        growth: float,
        found: Found | None = None,
        cut_by: CutBy | None = None,
    ) -> None:
        """Split `model`, in place. A collective call of all workers of `mesh`.

        Args:
            runs: forwards of the model and the loss, each on another small batch.
            found: where to split it, if that is known from an earlier model of the same job in the same layout.
            growth: how many times larger than a run's batch a worker's micro-batch is.
            cut_by: how to cut a pipeline's stages, if that is not known; None: by `runs[0]`, evenly.
            deferred: the parameters that have no values yet. Of those that stay whole here it still has them.
            schedule: of the pipeline; None where there is none.

        Raises:
            SplitError: the model cannot be split so.
            LayoutError: the model has too few pieces.
        """
        self.model, self.layout, self.mesh = model, layout, mesh
        self.replaced: dict[nn.Parameter, tuple[nn.Parameter, Cut] | None] = {}
        """What stands for each parameter that is not here as it was: see `swap_parameters`."""
        self._deferred = deferred
        whole = dict(model.named_parameters())
        shapes = {name: tuple(p.shape) for name, p in whole.items()}
        worker_of = schedule.worker_of if schedule is not None else _first
        workers = [worker_of(stage) for stage in range(1 if schedule is None else schedule.num_stages)]
        self.calls = PieceCalls(model, pieces_for(model, len(workers)))
        self.tensor: TensorParallel | None = None
        if found is None:
            with deferred.lending() as self.calls.around:
                found = self._find_out(runs, workers, growth, cut_by or CutBy())
            self.calls.around = None
        self.found = found
        self.calls.undivided = frozenset(found.left_whole)
        self.steady = [piece for piece in self.calls.pieces if piece.name in found.steady]
        self.stages = found.stages
        holders = self._holders(whole, worker_of)
        self._drop({name: p for name, p in whole.items() if mesh.pipeline.rank not in holders[name]})
        if found.tensor is not None:
            self._divide(mesh.tensor, found.tensor)
        shards: Mapping[str, Shard] = found.tensor.shards if found.tensor is not None else {}
        names = {id(p): name for name, p in model.named_parameters()}
        self.names = names
        self.parameters = {
            name: LocalParameter(name, p, shapes[name], shards.get(name), holders[name])
            for name, p in model.named_parameters()
            if mesh.pipeline.rank in holders[name]
        }
        self.requires_grad = {name: p.requires_grad for name, p in whole.items()}
        self.shapes, self.all_holders, self.shards = shapes, holders, shards
        self._buffer_holders = self._holders_of_buffers(worker_of)
        self._check_reached()
        if layout.recompute != "none":
            self.calls.compute = self.compute

    def trained_on(self, stage: int) -> list[nn.Parameter]:
        """The parameters that a stage of this worker has and trains."""
        assert self.stages is not None
        return [
            local.parameter
            for name, local in self.parameters.items()
            if stage in self.stages.holders[name] and self.requires_grad[name]
        ]

    def compute(self, piece: Piece, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run a piece that is here."""
        how = self.layout.recompute if piece.module.training else "none"
        return recomputed(forward, how, piece.module)(*args, **kwargs)

    @contextlib.contextmanager
    def computing(self) -> Iterator[None]:
        """Within it, calls to torch are made on this worker's pieces of tensors."""
        if self.tensor is None or self.tensor.is_active:
            yield
        else:
            with self.tensor:
                yield

    def collect(
        self, local: Iterator[tuple[str, torch.Tensor | None]], what: str
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        """Parameters, or what is shaped like them, whole; every name once, on rank 0.

        Others get what is theirs. A collective call. One tensor after the other; in a pipeline a stage's together.

        Args:
            local: name and tensor of what this worker has, not sharded any more.
        """
        whole = ((name, self._gathered(name, tensor)) for name, tensor in local)
        if self.mesh.pipeline.size == 1:
            yield from whole
            return
        holders = {name: workers[0] for name, workers in self.all_holders.items()}
        yield from self._from_stages(dict(whole), self.shapes, holders, what)

    def _gathered(self, name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        shard = self.shards.get(name)
        if tensor is None or shard is None:
            return tensor
        return gather_whole(tensor, shard, self.mesh.tensor, name)

    def collect_buffers(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The model's buffers, each from where it is computed, on rank 0. A collective call."""
        here: dict[str, torch.Tensor | None] = dict(self.model.named_buffers())
        if self.mesh.pipeline.size == 1:
            yield from here.items()
            return
        shapes = {name: tuple(t.shape) for name, t in here.items() if t is not None}
        yield from self._from_stages(here, shapes, self._buffer_holders, "buffers")

    def _from_stages(
        self,
        here: dict[str, torch.Tensor | None],
        shapes: dict[str, tuple[int, ...]],
        holders: dict[str, int],
        what: str,
    ) -> Iterator[tuple[str, torch.Tensor | None]]:
        group = self.mesh.pipeline
        dtypes = {name: None if t is None else str(t.dtype) for name, t in here.items()}
        told = group.gather_json(dtypes, what)
        for name, shape in shapes.items():
            holder = holders[name]
            dtype = told[holder].get(name)
            tensor = here.get(name)
            if holder == group.rank and group.rank != 0 and tensor is not None:
                group.start_send(tensor.detach().contiguous(), 0, f"{what} {name}").wait()
            elif group.rank == 0 and holder != 0:
                tensor = None
                if dtype is not None:
                    kind = getattr(torch, dtype.removeprefix("torch."))
                    tensor = torch.empty(shape, dtype=kind, device=group.device)
                    group.receive_(tensor, holder, f"{what} {name}")
            yield name, tensor

    def _find_out(
        self,
        runs: Sequence[Callable[[], Any]],
        workers: Sequence[int],
        growth: float,
        cut_by: CutBy,
    ) -> Found:
        """Where this model can be split, from forwards of the whole of it."""
        group, layout = self.mesh.everyone, self.layout
        found = Found()
        if layout.dp_shard > 1:
            steady, read_between = find_steady(group, self.model, self.calls, runs)
            found = dataclasses.replace(found, steady=steady, read_between=read_between)
        if layout.tp > 1:
            split, failed = find_proven_split(self.mesh, self.model, self.calls, runs[0], layout, growth)
            found = dataclasses.replace(found, tensor=split, left_whole=failed)
        if layout.pp > 1:
            stages, why = find_stages(group, self.model, self.calls, runs[0], workers, cut_by)
            found = dataclasses.replace(found, stages=stages, why_cut_so=why)
        return found

    def _holders(
        self, whole: dict[str, nn.Parameter], worker_of: Callable[[int], int]
    ) -> dict[str, tuple[int, ...]]:
        if self.stages is None:
            return dict.fromkeys(whole, (0,))
        return {name: tuple(sorted({worker_of(s) for s in self.stages.holders[name]})) for name in whole}

    def _holders_of_buffers(self, worker_of: Callable[[int], int]) -> dict[str, int]:
        """The pipeline's worker that keeps each buffer: the last that calls its piece."""
        result = dict.fromkeys((name for name, _ in self.model.named_buffers()), 0)
        if self.stages is not None:
            for (piece, _), stage in self.stages.calls.items():
                for name in result:
                    if name.startswith(f"{piece}."):
                        result[name] = worker_of(stage)
        return result

    def _drop(self, parameters: dict[str, nn.Parameter]) -> None:
        """Replace parameters that other stages have by ones without memory."""
        absent = {
            p: nn.Parameter(torch.empty_like(p, device="meta"), requires_grad=p.requires_grad)
            for p in parameters.values()
        }
        for module in self.model.modules():
            for key, held in module._parameters.items():
                if held is not None and held in absent:
                    module._parameters[key] = absent[held]
        self.replaced.update(dict.fromkeys(parameters.values()))

    def _divide(self, group: Group, split: TensorSplit) -> None:
        self.tensor = TensorParallel(group, by_position=split.by_position)
        divided = divide_parameters(
            self.model, split.shards, group.rank, group.size, lambda p: self._deferred.filled([p])
        )
        by_new = {id(new): name for name, new in self.model.named_parameters()}
        for old, new in divided.items():
            shard = split.shards[by_new[id(new)]]
            if not new.is_meta:
                self.replaced[old] = new, _cutter(shard, group)

    def _check_reached(self) -> None:
        for name, shard in self.shards.items():
            if name in self.parameters:
                local = self.parameters[name]
                size = local.shape[shard.dim] // self.layout.tp
                if local.parameter.shape[shard.dim] != size:
                    raise SplitError(
                        f"{name} should have been divided along dimension {shard.dim} and was not",
                        cause="an error in paceline",
                        next_step="leave out tp, and report it",
                    )


def _first(stage: int) -> int:
    return 0


def _cutter(shard: Shard, group: Group) -> Cut:
    return lambda tensor: take(tensor, shard, group.rank, group.size).clone()
