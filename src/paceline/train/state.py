"""The whole of a model of which each worker may have a part: sent out at the beginning, collected when asked for."""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence

import torch
from torch import nn

from paceline.comm.group import Group
from paceline.split.apply import LocalParameter, SplitModel
from paceline.split.sharding import ShardedParameters
from paceline.split.shared_parameters import SharedParameters

_BROADCAST_NUMEL = 1 << 22
"""Elements of parameters that are sent in one message, if more than one parameter is."""


class WholeState:
    """Parameters, gradients and buffers by the names that the model gives them, each whole.

    All workers call the same, and rank 0 gets everything. What another gets is what it happens to have.
    """

    def __init__(
        self,
        model: nn.Module,
        local: Sequence[LocalParameter],
        split: SplitModel | None = None,
        sharded: ShardedParameters | None = None,
        shared: SharedParameters | None = None,
    ) -> None:
        """
        Args:
            local: what is trained on this worker.
            sharded, shared: how that is kept, if not whole by every worker.
        """
        self._model, self._local, self._split, self._sharded = model, local, split, sharded
        self._shared = shared

    def parameters(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's parameters."""
        if self._split is None:
            yield from ((name, p.detach()) for name, p in self._model.named_parameters())
            return
        local: Iterator[tuple[str, torch.Tensor | None]]
        if self._sharded is not None:
            local = iter(self._sharded.whole_parameters())
        else:
            local = ((name, p.parameter.detach()) for name, p in self._split.parameters.items())
        yield from self._split.collect(local, "parameters")  # type: ignore[misc]

    def gradients(self) -> Iterator[tuple[str, torch.Tensor | None]]:
        """The gradients of what is trained, as the optimizer is about to get them; otherwise as `parameters`."""
        local: Iterator[tuple[str, torch.Tensor | None]]
        if self._sharded is not None:
            local = self._sharded.whole_gradients()
        elif self._shared is not None:
            local = self._shared.whole_gradients()
        else:
            local = ((p.name, p.parameter.grad) for p in self._local)
        if self._split is None:
            yield from local
            return
        for name, gradient in self._split.collect(local, "gradients"):
            if self._split.requires_grad[name]:
                yield name, gradient

    def describe(self) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Type and whole shape of each parameter and each buffer that is kept with the model, in the model's order."""
        shapes = {} if self._split is None else self._split.shapes
        kept = set(self._model.state_dict())
        parameters = {n: (p.dtype, shapes.get(n, tuple(p.shape))) for n, p in self._model.named_parameters()}
        return parameters | {
            n: (b.dtype, tuple(b.shape)) for n, b in self._model.named_buffers() if n in kept
        }

    def buffers(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The model's buffers, as `parameters`."""
        if self._split is None:
            yield from self._model.named_buffers()
        else:
            yield from self._split.collect_buffers()  # type: ignore[misc]


def broadcast(model: nn.Module, group: Group, but: Container[torch.Tensor] = ()) -> None:
    """Give every worker rank 0's parameters and buffers, one message per type of number.

    Args:
        but: parameters that are left as they are.
    """
    by_type: dict[torch.dtype, list[torch.Tensor]] = {}
    for tensor in [*(p for p in model.parameters() if p not in but), *model.buffers()]:
        by_type.setdefault(tensor.dtype, []).append(tensor.detach())
    for dtype, tensors in by_type.items():
        while tensors:
            # Small ones together, large ones alone: no second copy of a large model.
            count, numel = 1, tensors[0].numel()
            while count < len(tensors) and numel + tensors[count].numel() <= _BROADCAST_NUMEL:
                numel += tensors[count].numel()
                count += 1
            together, tensors = tensors[:count], tensors[count:]
            flat = torch.cat([t.reshape(-1) for t in together])
            wire = flat.to(torch.uint8) if dtype == torch.bool else flat
            group.broadcast_(wire, "initial parameters")
            for tensor, piece in zip(together, wire.split([t.numel() for t in together]), strict=True):
                tensor.copy_(piece.view(tensor.shape))
