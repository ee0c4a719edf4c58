"""From each worker's gradients to those of the global batch, over every axis of a layout."""

from __future__ import annotations

import dataclasses
from collections.abc import Container, Sequence

import torch
from torch import nn

from paceline.comm.gradients import GradientSync
from paceline.comm.links import StageLinks
from paceline.comm.mesh import Mesh
from paceline.split.apply import LocalParameter
from paceline.split.sharding import ShardedParameters
from paceline.split.shared_parameters import SharedParameters


@dataclasses.dataclass(frozen=True)
class Sums:
    """The sums that travel with the gradients, by their places."""

    num: int
    num_alike: int
    """The first so many are the same on all workers of a tensor-parallel group."""
    weight: int
    """By this one gradients are divided, ..."""
    weighted: int
    """... where this one is not zero."""


class Reduction:
    """Adds up gradients, and the step's sums, over the workers of a mesh."""

    def __init__(
        self,
        mesh: Mesh,
        parameters: Sequence[LocalParameter],
        sums: Sums,
        sharded: ShardedParameters | None,
        shared: SharedParameters | None,
        links: StageLinks | None,
        first_stage_of: dict[int, int],
    ) -> None:
        """
        Args:
            parameters: what is trained here, in the model's order.
            sharded, shared: how they are kept, if not whole by every worker.
            first_stage_of: a stage of each of the pipeline's workers, by which they are reached.
        """
        self._mesh, self._parameters, self._sharded, self._links = mesh, list(parameters), sharded, links
        self._first_stage_of = first_stage_of
        self._sums, self._shared = sums, shared
        self._sync: GradientSync | SharedParameters | None = shared
        if shared is None and sharded is None and mesh.data.size > 1:
            self._sync = GradientSync([p.parameter for p in parameters], mesh.data, sums.num)
        self._tied = [p for p in parameters if len(p.holders) > 1]

    def begin_backward(self, *, last: bool) -> None:
        """Called before each backward pass; `last` is the step's last micro-batch."""
        if self._sync is not None:
            self._sync.begin_backward(last=last)

    def finish(self, sums: torch.Tensor, *, weighted: bool) -> torch.Tensor:
        """Complete the step's reduction: afterwards the gradients are those of the global batch.

        Args:
            sums: float32, shape `[num]`: this worker's part of the step's sums.
            weighted: gradients are to be divided by the sum of the weights, as far as this worker knows.

        Returns:
            The global sums, float32, shape `[num]`, on the CPU.
        """
        mesh = self._mesh
        if mesh.everyone is mesh.data and self._sync is not None:
            return self._sync.finish(sums, self._sums.weight if weighted else None)
        self._add_up_tied()
        if self._sharded is not None:
            self._sharded.finish()
            if mesh.replicate.size > 1:
                for flat in self._sharded.shard_gradients():
                    mesh.replicate.sum_(flat, "gradients of shards")
        elif self._sync is not None:
            self._sync.finish(torch.zeros(self._sums.num), None)
        sums = sums.clone()
        if mesh.tensor.rank > 0:
            sums[: self._sums.num_alike] = 0.0
        sums = mesh.everyone.sum_(sums, "the step's sums").to("cpu")
        weight = float(sums[self._sums.weight])
        if sums[self._sums.weighted] > 0 and weight:
            if self._keeper is not None:
                self._keeper.scale_(1.0 / weight)
            else:
                gradients = [p.parameter.grad for p in self._parameters if p.parameter.grad is not None]
                torch._foreach_mul_(gradients, 1.0 / weight)
        return sums

    def clip_(self, largest: float) -> float:
        """Scale the gradients to a global norm of at most `largest`, as torch's clip_grad_norm_; the norm before."""
        mesh = self._mesh
        if mesh.everyone is mesh.data and self._keeper is None:
            return float(nn.utils.clip_grad_norm_([p.parameter for p in self._parameters], largest))
        found = [self._gradient(local) for local in self._parameters]
        gradients = [gradient for gradient in found if gradient is not None]
        counted = self.counted_gradients()
        own = torch.zeros(1, dtype=torch.float64, device=mesh.everyone.device)
        if counted:
            own += torch.stack(torch._foreach_norm(counted)).double().square().sum()
        norm = float(mesh.everyone.sum_(own, "the gradients' norm").sqrt())
        factor = largest / (norm + 1e-6)
        if factor < 1.0 and gradients:
            torch._foreach_mul_(gradients, factor)
        return norm

    def counted_gradients(self, but: Container[str] = ()) -> list[torch.Tensor]:
        """What this worker has of the gradients, such that each number is counted by one worker; after `finish`.

        Args:
            but: names of parameters that are not counted.
        """
        counted = (local for local in self._parameters if local.name not in but and self._counts(local))
        found = (self._gradient(local) for local in counted)
        return [gradient for gradient in found if gradient is not None]

    @property
    def _keeper(self) -> ShardedParameters | SharedParameters | None:
        """Who has the gradients, if the parameters have not."""
        return self._sharded if self._shared is None else self._shared

    def _gradient(self, local: LocalParameter) -> torch.Tensor | None:
        if self._keeper is None:
            return local.parameter.grad
        piece = self._keeper.pieces.get(local.name)
        return None if piece is None else piece.grad

    def _counts(self, local: LocalParameter) -> bool:
        """Whether this worker's share of the parameter's gradient is its to count."""
        mesh = self._mesh
        return (
            (mesh.replicate.rank == 0 if self._shared is None else self._shared.counts)
            and (local.shard is not None or mesh.tensor.rank == 0)
            and (self._sharded is not None or mesh.shard.rank == 0)
            and local.holders[0] == mesh.pipeline.rank
        )

    def _add_up_tied(self) -> None:
        """Gradients of parameters that several stages have: each gets those of the others, added in the same order."""
        if self._links is None:
            return
        own = self._mesh.pipeline.rank
        stage = self._first_stage_of[own]
        for local in self._tied:
            gradient = local.parameter.grad
            for worker in local.holders:
                if worker != own:
                    flag = torch.tensor(
                        [gradient is not None], dtype=torch.uint8, device=local.parameter.device
                    )
                    self._links.send(flag, stage, self._first_stage_of[worker], "tied")
                    if gradient is not None:
                        self._links.send(gradient.contiguous(), stage, self._first_stage_of[worker], "tied")
            total: torch.Tensor | None = None
            for worker in local.holders:
                found = gradient if worker == own else self._receive_tied(local, worker, stage)
                if found is not None:
                    total = found.clone() if total is None else total + found
            self._links.flush()
            local.parameter.grad = total

    def _receive_tied(self, local: LocalParameter, worker: int, stage: int) -> torch.Tensor | None:
        assert self._links is not None
        source = self._first_stage_of[worker]
        flag = torch.zeros(1, dtype=torch.uint8, device=local.parameter.device)
        if not int(self._links.receive(flag, source, stage, "tied")):
            return None
        empty = torch.empty_like(local.parameter, requires_grad=False)
        return self._links.receive(empty, source, stage, "tied")
