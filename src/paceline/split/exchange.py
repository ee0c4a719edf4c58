"""Changing how a tensor lies on the workers of a tensor-parallel group, with gradients.

One rule makes all of them fit together: the gradient of a tensor that is whole on every worker is whole and the same on
every worker; that of a divided tensor is divided alike. What is read in whole by a computation that is itself divided
gets a part of its gradient from each worker: `share` adds them up (Shoeybi et al. 2019 call it f, and `add_up` g).

Cost per worker for a tensor of b bytes: `share` and `add_up` an all-reduce of b (the one backward, the other forward);
`gather` an all-gather of b; `cut` nothing forward, an all-gather of b backward; `add_up_pieces` a reduce-scatter of b
forward and an all-gather backward, `share_whole` the reverse.
For tensors that have shapes only, on the meta device or fake, nothing is exchanged.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from paceline.comm.group import Group
from paceline.split.formats import as_it_lies, memory_format_of
from paceline.split.placement import Shard, join, take


def share(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """A whole tensor, to be read by a divided computation: the same forward, gradients added up backward."""
    return _Share.apply(tensor, group)  # type: ignore[no-any-return]


def share_together(tensors: Sequence[torch.Tensor], group: Group) -> tuple[torch.Tensor, ...]:
    """`share`, with one message for all of their gradients."""
    return _ShareTogether.apply(group, *tensors)  # type: ignore[no-any-return]


def add_up(tensor: torch.Tensor, group: Group) -> torch.Tensor:
    """The sum of what each worker computed: an all-reduce forward, the same gradient backward."""
    return _AddUp.apply(tensor, group)  # type: ignore[no-any-return]


def gather(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    """A divided tensor made whole on every worker."""
    return _Gather.apply(tensor, shard, group)  # type: ignore[no-any-return]


def share_whole(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    """A divided tensor made whole, for a divided computation: gradients are added up, each worker gets its piece."""
    return _ShareWhole.apply(tensor, shard, group)  # type: ignore[no-any-return]


def add_up_pieces(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    """This worker's piece of the sum of what each worker computed."""
    return _AddUpPieces.apply(tensor, shard, group)  # type: ignore[no-any-return]


def cut(tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
    """This worker's piece of a whole tensor."""
    if not tensor.requires_grad or not torch.is_grad_enabled():
        return take(tensor, shard, group.rank, group.size)
    return _Cut.apply(tensor, shard, group)  # type: ignore[no-any-return]


class _Silence(threading.local):
    depth = 0


_silence = _Silence()


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Within it nothing is exchanged, by this thread: results are asked for their shapes only."""
    _silence.depth += 1
    try:
        yield
    finally:
        _silence.depth -= 1


def has_no_values(tensor: torch.Tensor) -> bool:
    """Whether it is a shape only, for which nothing is exchanged."""
    return _silence.depth > 0 or tensor.is_meta or isinstance(tensor, FakeTensor)


def sum_over(tensor: torch.Tensor, group: Group, what: str) -> torch.Tensor:
    """A new tensor: the sum over the group, without gradient."""
    if has_no_values(tensor):
        return tensor.clone()
    own = tensor.clone(memory_format=torch.contiguous_format)
    return as_it_lies(tensor, group.sum_(own, what))


def sum_pieces(tensor: torch.Tensor, shard: Shard, group: Group, what: str) -> torch.Tensor:
    """A new tensor: this worker's piece of the sum over the group, without gradient."""
    if has_no_values(tensor):
        return take(tensor, shard, group.rank, group.size).clone()
    pieces = torch.stack([take(tensor, shard, rank, group.size) for rank in range(group.size)])
    group.reduce_scatter_(pieces.view(-1), what)
    return as_it_lies(tensor, pieces[group.rank].clone())


def gather_whole(tensor: torch.Tensor, shard: Shard, group: Group, what: str) -> torch.Tensor:
    """A new tensor, whole, without gradient."""
    if has_no_values(tensor):
        return join([tensor] * group.size, shard)
    if tensor.dtype == torch.bool:
        return gather_whole(tensor.to(torch.uint8), shard, group, what).to(torch.bool)
    return as_it_lies(tensor, join(group.gather(tensor.contiguous(), what).unbind(0), shard))


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        ctx.group = group
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return sum_over(gradient, ctx.group, "gradients of tensor parallelism"), None


class _ShareTogether(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, group: Group, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.group = group
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        flat = sum_over(flat, ctx.group, "gradients of tensor parallelism")
        parts = flat.split([gradient.numel() for gradient in gradients])
        return None, *(part.view_as(g) for part, g in zip(parts, gradients, strict=True))


class _AddUp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, group: Group) -> torch.Tensor:
        return sum_over(tensor, group, "activations of tensor parallelism")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        return gradient, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
        ctx.shard, ctx.group = shard, group
        return gather_whole(tensor, shard, group, "activations of tensor parallelism")

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        own = take(gradient, ctx.shard, ctx.group.rank, ctx.group.size)
        return own.contiguous(memory_format=memory_format_of(gradient)), None, None


class _ShareWhole(_Gather):
    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return sum_pieces(gradient, ctx.shard, ctx.group, "gradients of tensor parallelism"), None, None


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
        ctx.shard, ctx.group = shard, group
        return take(tensor, shard, group.rank, group.size).clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return gather_whole(gradient, ctx.shard, ctx.group, "gradients of tensor parallelism"), None, None


class _AddUpPieces(_Cut):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, shard: Shard, group: Group) -> torch.Tensor:
        ctx.shard, ctx.group = shard, group
        return sum_pieces(tensor, shard, group, "activations of tensor parallelism")


class RowsCrossEntropy(torch.autograd.Function):
    """log Σ exp(scores) − scores[target] for each row, where each worker has some classes of every row.

    Forward gathers three numbers per row: the worker's largest score, Σ exp(score − largest), and the
    target's score where the worker has it. Backward needs nothing: softmax − 1 at the target.
    Shapes: scores [M, C / n], target [M], result [M].
    """

    @staticmethod
    def forward(
        ctx: Any,
        scores: torch.Tensor,
        target: torch.Tensor,
        begin: int,
        gather: Callable[[torch.Tensor], torch.Tensor],
    ) -> torch.Tensor:
        wide = scores if scores.dtype == torch.float64 else scores.float()
        own = target - begin
        is_here = (own >= 0) & (own < scores.shape[1])
        own = own.masked_fill(~is_here, 0)
        largest = wide.max(1).values
        total = (wide - largest[:, None]).exp().sum(1)
        at_target = wide.gather(1, own[:, None])[:, 0].masked_fill(~is_here, 0.0)
        rows = gather(torch.stack([largest, total, at_target]))
        maximum = rows[:, 0].max(0).values
        log_total = (rows[:, 1] * (rows[:, 0] - maximum).exp()).sum(0).log() + maximum
        ctx.save_for_backward(scores, own, is_here, log_total)
        return (log_total - rows[:, 2].sum(0)).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        scores, own, is_here, log_total = ctx.saved_tensors
        result = (scores - log_total[:, None].to(scores.dtype)).exp()
        result.scatter_add_(1, own[:, None], -is_here[:, None].to(result.dtype))
        return result.mul_(gradient[:, None]), None, None, None
