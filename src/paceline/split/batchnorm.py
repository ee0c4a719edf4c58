"""Batch normalisation over the global batch, on any device.

Each worker sees a share of the micro-batch; the statistics must be those of the whole. (PyTorch's
SyncBatchNorm does this on GPUs only.)
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import handle_torch_function, has_torch_function_unary

from paceline.comm.group import Group
from paceline.split.exchange import has_no_values

_GRADIENTS = "batch-norm gradients"


class BatchShare:
    """What the batch norms of one model need to know of this worker's share of the micro-batch."""

    def __init__(self) -> None:
        self.group: Group | None = None
        """The workers among which the batch is split, while one is; None: this worker computes for itself."""
        self.counts = True
        """False while this worker computes on a borrowed sample, because its share is empty."""

    @contextlib.contextmanager
    def among(self, group: Group) -> Iterator[None]:
        """Batches are split among the workers of `group`: all of them compute within."""
        self.group = group if group.size > 1 else None
        try:
            yield
        finally:
            self.group, self.counts = None, True


def share_batch_norms(model: nn.Module, share: BatchShare) -> list[str]:
    """Let the batch norms of `model` take their statistics over all workers of `share.group`.

    The modules stay what they are: class, parameter names, buffers and hooks. Where they use running
    statistics, or outside `share.among(...)`, they compute what they always did.

    Returns:
        The names of the modules that were reached.
    """
    reached = []
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            module.forward = functools.partial(_forward, module, module.forward, share)  # type: ignore[method-assign]
            reached.append(name)
    return reached


def _forward(module: _BatchNorm, local_forward: Any, share: BatchShare, x: torch.Tensor) -> torch.Tensor:
    if share.group is None or not _uses_batch_statistics(module):
        return local_forward(x)  # type: ignore[no-any-return]
    if has_no_values(x):
        return _without_values(module, x)
    module._check_input_dim(x)
    tracks = module.training and module.track_running_stats
    if tracks and module.num_batches_tracked is not None:
        module.num_batches_tracked.add_(1)
    y, mean, variance, count = normalise(x, module.weight, module.bias, module.eps, share.group, share.counts)
    if tracks and module.running_mean is not None and module.running_var is not None:
        momentum = module.momentum
        if momentum is None:
            assert module.num_batches_tracked is not None
            momentum = 1.0 / float(module.num_batches_tracked)
        with torch.no_grad():
            unbiased = variance * (count / (count - 1).clamp(min=1))
            module.running_mean.lerp_(mean.to(module.running_mean.dtype), momentum)
            module.running_var.lerp_(unbiased.to(module.running_var.dtype), momentum)
    return y


def _without_values(module: _BatchNorm, x: torch.Tensor) -> torch.Tensor:
    """Where the shape alone counts: of a share of one sample torch would refuse to take statistics."""
    mean, variance = module.running_mean, module.running_var
    if mean is None or variance is None:
        mean = variance = x.new_zeros(x.shape[1])
    return F.batch_norm(x, mean, variance, module.weight, module.bias, False, 0.0, module.eps)


def uses_batch_statistics(module: nn.Module) -> bool:
    """Whether it normalises a sample by others of its batch."""
    return isinstance(module, _BatchNorm) and _uses_batch_statistics(module)


def _uses_batch_statistics(module: _BatchNorm) -> bool:
    return module.training or module.running_mean is None


def normalise(
    x: torch.Tensor,
    weight: torch.Tensor | None,
    bias: torch.Tensor | None,
    eps: float,
    group: Group,
    counts: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Normalised x, mean and variance per channel, and the elements per channel, over all workers of `group`.

    A function that modes see, as they see torch's own: tensor parallelism has a rule for it.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(normalise, (x,), x, weight, bias, eps, group, counts)
    return _GlobalBatchNorm.apply(x, weight, bias, eps, group, counts)  # type: ignore[no-any-return]


class _GlobalBatchNorm(torch.autograd.Function):
    """y = weight · (x − mean) / sqrt(var + eps) + bias with mean and var over all workers.

    Forward gathers each worker's (mean, sum of squared deviations, count) per channel and merges
    them (Chan et al. 1979); backward sums two numbers per channel: Σ dy and Σ dy·x̂.
    Shapes: x is [N, C, …]; mean and var are [C].
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor | None,
        bias: torch.Tensor | None,
        eps: float,
        group: Group,
        counts: bool,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
        num_channels = x.shape[1]
        count = x.numel() // num_channels if counts else 0
        mean, variance = _local_statistics(x)
        local = torch.cat([mean, variance * count, mean.new_tensor([float(count)])])
        rows = group.gather(local, "batch-norm statistics")
        means, deviations, row_counts = rows[:, :num_channels], rows[:, num_channels:-1], rows[:, -1:]
        total = row_counts.sum()
        mean = (means * row_counts).sum(0) / total
        variance = (deviations.sum(0) + ((means - mean).square() * row_counts).sum(0)) / total
        y = torch.batch_norm(x, weight, bias, mean, variance, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, variance)
        ctx.group, ctx.eps, ctx.total, ctx.counts = group, eps, total, counts
        ctx.mark_non_differentiable(mean, variance, total)
        return y, mean, variance, total

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor, *_: Any) -> tuple[torch.Tensor | None, ...]:
        dx, d_weight, d_bias = (_backward_on_gpu if dy.is_cuda else _backward_on_cpu)(ctx, dy)
        if not ctx.counts:
            # A borrowed sample is no part of the statistics, which do not depend on it.
            dx.zero_()
        return dx, d_weight, d_bias, None, None, None


def _backward_on_cpu(
    ctx: Any, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    x, weight, mean, variance = ctx.saved_tensors  # once: what is computed again can be taken no second time
    inverse = torch.rsqrt(variance + ctx.eps)
    # With mean and variance held fixed the fused kernel gives dy·scale, Σ dy·x̂ and Σ dy ...
    dx, d_weight, d_bias = torch.ops.aten.native_batch_norm_backward(
        dy, x, weight, mean, variance, None, None, False, ctx.eps, [True, True, True]
    )
    # ... and as they depend on x, scale · (mean(dy) + x̂ · mean(dy·x̂)) goes off again: affine in x.
    sums = torch.stack([_wide(d_bias), _wide(d_weight)])
    mean_dy, mean_dy_normalized = ctx.group.sum_(sums, _GRADIENTS) / ctx.total
    scale = inverse if weight is None else inverse * _wide(weight)
    slope = -scale * inverse * mean_dy_normalized
    offset = -scale * mean_dy - slope * mean
    shape = [1, -1, *[1] * (x.dim() - 2)]
    dx.addcmul_(x, slope.view(shape).to(x.dtype)).add_(offset.view(shape).to(x.dtype))
    return (dx, None, None) if weight is None else (dx, d_weight, d_bias)


def _backward_on_gpu(
    ctx: Any, dy: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """By the kernels of torch's SyncBatchNorm, the same for all orders of the dimensions in memory."""
    x, weight, mean, variance = ctx.saved_tensors
    inverse = torch.rsqrt(variance + ctx.eps)
    x = _dense(x)
    if dy.stride() != x.stride():
        dy = torch.empty_like(x, dtype=dy.dtype).copy_(dy)
    scales = weight is not None
    sum_dy, sum_dy_deviation, d_weight, d_bias = torch.batch_norm_backward_reduce(
        dy, x, mean, inverse, weight, True, scales, scales
    )
    sums = ctx.group.sum_(torch.stack([sum_dy, sum_dy_deviation]), _GRADIENTS)
    count = ctx.total.to(torch.int32).view(1)
    dx = torch.batch_norm_backward_elemt(dy, x, mean, inverse, weight, sums[0], sums[1], count)
    return (dx, d_weight, d_bias) if scales else (dx, None, None)


def _dense(x: torch.Tensor) -> torch.Tensor:
    """Without gaps in memory, its channels last where they are."""
    last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last)
    return x if last else x.contiguous()


def _local_statistics(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and biased variance per channel of [N, C, …], in at least float32."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        mean, variance = torch.batch_norm_update_stats(x, None, None, 0.0)
        return mean, variance
    variance, mean = torch.var_mean(_wide(x), dim=[0, *range(2, x.dim())], correction=0)
    return mean, variance


def _wide(tensor: torch.Tensor) -> torch.Tensor:
    """In float32, or in float64 where it is that already."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
