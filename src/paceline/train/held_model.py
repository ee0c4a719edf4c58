"""A model and its optimizer as one worker holds them: whole, shared with its host, in shards, or a part of a layout."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.comm.mesh import Mesh
from paceline.errors import JobError, WorkerError
from paceline.job import Job
from paceline.split.apply import LocalParameter, SplitModel
from paceline.split.finding import Found
from paceline.split.fused import prefer_fused
from paceline.split.granularity import NUMBERS, TENSORS, granularity
from paceline.split.sharding import ShardedParameters
from paceline.split.shared_parameters import SharedParameters
from paceline.split.swap import swap_parameters
from paceline.train.allocator import give_back_freed_memory
from paceline.train.build import build_model, build_optimizer, everyone_fills_alike
from paceline.train.cutting import cut_by
from paceline.train.data import FEW_TOGETHER
from paceline.train.moving import Piece
from paceline.train.pipeline import schedule_of
from paceline.train.state import WholeState, broadcast

_SUMMED_NUMEL = 1 << 20


class HeldModel:
    """One worker's model, or its part of one, with the optimizer of what it updates."""

    def __init__(
        self,
        job: Job,
        *,
        seed: int,
        device: torch.device,
        dtype: torch.dtype | None,
        in_parts: bool,
        num_sums: int,
    ) -> None:
        """
        Args:
            dtype: of the parameters; None: as the job says.
            in_parts: `split` will be called: the whole model need not be in memory.
            num_sums: how many numbers travel with the gradients.

        Raises:
            JobError: it is no model, or has nothing to train.
        """
        self._job, self._num_sums = job, num_sums
        self.model, self.deferred = build_model(job, seed, device, dtype, in_parts=in_parts)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        if not self.trained:
            raise JobError(
                "the model has no parameter to train",
                cause="all of them have requires_grad=False",
                next_step="leave at least one trainable",
            )
        self.optimizer = build_optimizer(job, self.trained, self.deferred)
        prefer_fused(self.optimizer)
        self.num_parameters = sum(p.numel() for p in self.model.parameters())
        """Of the whole model."""
        self.local = [
            LocalParameter(name, p, tuple(p.shape), None, (0,))
            for name, p in self.model.named_parameters()
            if p.requires_grad
        ]
        """What is trained here."""
        self.parts: SplitModel | None = None
        self.sharded: ShardedParameters | None = None
        self.shared: SharedParameters | None = None
        self.why_not_shared = ""
        """Why each worker keeps all parameters for itself, where that is not what was to be expected."""
        self.state = WholeState(self.model, self.local)
        self._tensor = Group.alone(device)

    def attach(self, mesh: Mesh) -> None:
        """See `Replica.attach`."""
        kind = self._kind_of_sharing(mesh)
        named = dict(self.model.named_parameters())
        # Shared parameters are rank 0's by themselves.
        self._join(mesh, but=set(named.values()) if kind else self.deferred)
        if kind:
            self._share(named, mesh, kind)
            self.state = WholeState(self.model, self.local, shared=self.shared)
        give_back_freed_memory()

    def split(
        self,
        mesh: Mesh,
        runs: Sequence[Callable[[], None]],
        found: Found | None,
        timed: Callable[[], None] | None = None,
    ) -> SplitModel:
        """See `Replica.split`.

        Args:
            runs: each runs the model on a small batch.
            timed: runs it on one as large as a micro-batch.
        """
        if not everyone_fills_alike(self.deferred, mesh.everyone):
            self.deferred.settle(self.model.parameters())
        self._join(mesh, but=self.deferred)
        layout = mesh.layout
        micro_batch = self._job.batch_size / (layout.data_parallel * layout.micro)
        self.parts = parts = SplitModel(
            self.model,
            layout,
            mesh,
            runs,
            schedule_of(layout),
            self.deferred,
            growth=micro_batch / FEW_TOGETHER,
            found=found,
            cut_by=cut_by(mesh, timed) if layout.pp > 1 and found is None else None,
        )
        self._tensor = mesh.tensor
        swap_parameters(self.optimizer, parts.replaced)
        # Nothing keeps the whole parameters any more.
        parts.replaced = {}
        self.local = [local for local in parts.parameters.values() if parts.requires_grad[local.name]]
        if layout.dp_shard > 1:
            self._shard(parts, mesh)
        elif kind := self._kind_of_sharing(mesh):
            self._share({n: p.parameter for n, p in parts.parameters.items()}, mesh, kind)
        # Those that are kept together have got their values.
        have_values = self.sharded is not None or self.shared is not None
        self.deferred.settle([] if have_values else [p.parameter for p in parts.parameters.values()])
        self.trained = [local.parameter for local in self.local]
        self.state = WholeState(self.model, self.local, parts, self.sharded, self.shared)
        give_back_freed_memory()
        return parts

    def begin_pass(self) -> None:
        """Before a step, or an evaluation."""
        if self.sharded is not None:
            self.sharded.begin_step()

    def publish(self) -> None:
        """After the optimizer's step: return when the others may read what it wrote."""
        if self.sharded is not None:
            self.sharded.publish()
        if self.shared is not None:
            self.shared.publish()

    def end_evaluation(self) -> None:
        """After the last batch of an evaluation."""
        if self.sharded is not None:
            self.sharded.end_evaluation()

    def trained_pieces(self) -> list[Piece]:
        """What this worker updates: for each of them its optimizer may have a state."""
        keeper = self.sharded if self.shared is None else self.shared
        if keeper is None:
            return [self._piece(local, local.parameter) for local in self.local]
        return [
            self._piece(local, keeper.pieces[local.name], *keeper.ranges[local.name])
            for local in self.local
            if local.name in keeper.pieces
        ]

    def value_pieces(self) -> list[Piece]:
        """Where the values of all parameters lie that are this worker's to fill; `refresh` afterwards."""
        if self.shared is not None and not self.shared.is_first_here:
            return []
        if self.parts is not None:
            local = list(self.parts.parameters.values())
        else:
            local = [
                LocalParameter(n, p, tuple(p.shape), None, (0,)) for n, p in self.model.named_parameters()
            ]
        if self.sharded is None:
            return [self._piece(one, one.parameter.detach()) for one in local]
        shard_of, ranges = self.sharded.shard_of, self.sharded.ranges
        held = [one for one in local if ranges[one.name][0] < ranges[one.name][1]]
        return [self._piece(one, shard_of(one.name), *ranges[one.name]) for one in held]

    def refresh(self) -> None:
        """After parameters were filled: return when all workers have theirs."""
        if self.sharded is not None:
            self.sharded.refresh()
        if self.shared is not None:
            self.shared.publish()

    def _piece(self, local: LocalParameter, tensor: torch.Tensor, begin: int = 0, end: int = -1) -> Piece:
        group = self._tensor
        return Piece(local.name, tensor, local.shape, local.shard, group.rank, group.size, begin, end)

    def check_in_step(self, mesh: Mesh, when: str) -> None:
        """Raise `WorkerError` unless workers that should hold the same parameters do, bit for bit in their sums."""
        if self.shared is None or self.shared.has_copies:
            self._check_group(mesh.replicate, self.local, when)
        self._check_group(mesh.tensor, [p for p in self.local if p.shard is None], when)

    def _join(self, mesh: Mesh, but: Container[torch.Tensor]) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        if mesh.everyone.size > 1:
            broadcast(self.model, mesh.everyone, but=but)

    def _kind_of_sharing(self, mesh: Mesh) -> str:
        """How the update can be shared out among workers with memory in common; empty: it cannot, or they have none."""
        if mesh.data.grid is None or mesh.layout.dp_shard > 1:
            return ""
        kinds = set(mesh.data.gather_json(granularity(self.optimizer), "what the optimizer updates"))
        if not kinds <= {NUMBERS, TENSORS}:
            self.why_not_shared = "the optimizer looks at all parameters together, or could not be tried out"
            return ""
        return TENSORS if TENSORS in kinds else NUMBERS

    def _share(self, named: dict[str, nn.Parameter], mesh: Mesh, kind: str) -> None:
        late = {local.parameter for local in self.local if len(local.holders) > 1}
        try:
            shared = SharedParameters(named, mesh.data, self.deferred, self._num_sums, kind=kind, late=late)
        except OSError as error:
            self.why_not_shared = str(error.strerror)
            broadcast(self.model, mesh.everyone, but=self.deferred)
            return
        self.shared = shared
        swap_parameters(self.optimizer, shared.replaced)
        shared.replaced = {}

    def _shard(self, parts: SplitModel, mesh: Mesh) -> None:
        keep = {1: "always", 2: "within_step", 3: "nothing"}[mesh.layout.zero_stage]
        here = {id(local.parameter) for local in parts.parameters.values()}
        blocks = [
            piece.module for piece in parts.steady if any(id(p) in here for p in piece.module.parameters())
        ]
        apart = [
            parts.parameters[name].parameter for name in parts.found.read_between if name in parts.parameters
        ]
        self.sharded = ShardedParameters(
            self.model,
            blocks,
            apart,
            mesh.shard,
            mesh.data,
            self.deferred,
            keep=keep,
            waits=mesh.layout.keeps_gradients,
        )
        swap_parameters(self.optimizer, self.sharded.replaced)
        self.sharded.replaced = {}

    def _check_group(self, group: Group, parameters: list[LocalParameter], when: str) -> None:
        if group.size == 1 or not parameters:
            return
        held = [self._held(local) for local in parameters]
        own = torch.stack([_sum(tensor) for tensor in held])
        rows = group.gather(own, "parameter checksums")
        for rank in range(1, group.size):
            # Bits are compared, so that NaN equals NaN.
            parted = (rows[rank].view(torch.int64) != rows[0].view(torch.int64)).nonzero()
            if len(parted):
                raise WorkerError(
                    rank,
                    f"{when} the parameters of rank {rank} differ from rank 0's, "
                    f"first in {parameters[int(parted[0])].name}",
                    cause="the optimizer or the model draws random numbers of its own, or reads the rank",
                    next_step="make updates depend on parameters and gradients alone",
                )

    def _held(self, local: LocalParameter) -> torch.Tensor:
        """What this worker has of a parameter and trains: all of it, or its shard."""
        if self.sharded is None:
            return local.parameter.detach()
        piece = self.sharded.pieces.get(local.name)
        return torch.zeros(1, device=local.parameter.device) if piece is None else piece.detach()


def _sum(tensor: torch.Tensor) -> torch.Tensor:
    """In float64, without a copy of all of it."""
    return torch.stack([piece.double().sum() for piece in tensor.reshape(-1).split(_SUMMED_NUMEL)]).sum()
