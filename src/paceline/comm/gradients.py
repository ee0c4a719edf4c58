"""Averaging gradients over the workers of a data-parallel group."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import nn

from paceline.comm.group import Group, Pending
from paceline.errors import JobError
from paceline.plan.overlap import bucket_bytes


@dataclasses.dataclass
class _Bucket:
    """Parameters whose gradients travel in one message: `flat` holds them end to end."""

    parameters: list[nn.Parameter]
    flat: torch.Tensor
    slices: list[torch.Tensor]
    """A view of `flat` for each parameter, in its shape, and with its elements where the parameter has them."""
    num_missing: int = 0
    pending: Pending | None = None


class GradientSync:
    """Sums the gradients of one model over a group, a few large messages a step.

    Cost per step and worker: with P bytes of gradients, a copy into the buckets (2P bytes of memory
    traffic) and an all-reduce of P. The last bucket also carries the step's sums (loss, weight, …) and
    one flag per parameter: a parameter that no worker used keeps `grad = None`, exactly as in one
    process, so that the optimizer leaves it alone.

    Buckets are filled in reverse order of the parameters, which is about the order in which
    the backward pass finishes them; each starts on its way when it is full (`begin_backward(last=True)`).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], group: Group, num_sums: int) -> None:
        """
        Args:
            parameters: what the optimizer updates; the same order on every worker, no duplicates.
            num_sums: how many numbers `finish` adds up beside the gradients.
        """
        self._group = group
        self._parameters = list(parameters)
        self._num_sums = num_sums
        size_bytes = bucket_bytes(group.device.type, over_network=group.is_over_network)
        self._buckets = self._fill_buckets(size_bytes)
        self._tail = self._make_tail()
        self._ready_in_order = 0
        self._last_backward = False
        if size_bytes is not None and len(self._buckets) > 1:
            for bucket in self._buckets:
                for parameter in bucket.parameters:
                    parameter.register_post_accumulate_grad_hook(self._make_hook(bucket))

    def begin_backward(self, *, last: bool) -> None:
        """Called before each backward pass; `last` is the step's last micro-batch."""
        self._last_backward = last
        if last:
            self._ready_in_order = 0
            for bucket in self._buckets:
                bucket.num_missing = len(bucket.parameters)
                bucket.pending = None

    def finish(self, sums: torch.Tensor, scale_by_sum: int | None) -> torch.Tensor:
        """Complete the step's reduction: afterwards `parameter.grad` is the global gradient.

        Args:
            sums: float32, shape `[num_sums]`: this worker's part of the step's sums.
            scale_by_sum: divide the gradients by this entry of the global sums; None: leave them.

        Returns:
            The global sums, float32, shape `[num_sums]`, on the CPU.
        """
        self._last_backward = False
        for bucket in self._buckets[self._ready_in_order :]:
            self._launch(bucket)
        used = torch.tensor([float(p.grad is not None) for p in self._parameters])
        self._tail[: self._num_sums] = sums
        self._tail[self._num_sums :] = used
        if self._tail_rides_along:
            # The only bucket waited for its tail.
            self._start(self._buckets[-1])
        else:
            self._group.sum_(self._tail, "the step's sums")
        for bucket in self._buckets:
            if bucket.pending is not None:
                bucket.pending.wait()
        tail = self._tail.to("cpu", copy=True)
        sums, used = tail[: self._num_sums], tail[self._num_sums :]
        if scale_by_sum is not None:
            for bucket in self._buckets:
                bucket.flat.mul_(1.0 / float(sums[scale_by_sum]))
        flags = dict(zip(map(id, self._parameters), used.tolist(), strict=True))
        for bucket in self._buckets:
            for parameter, view in zip(bucket.parameters, bucket.slices, strict=True):
                parameter.grad = view if flags[id(parameter)] > 0 else None
        return sums

    def _fill_buckets(self, most_bytes: int | None) -> list[_Bucket]:
        groups: list[list[nn.Parameter]] = []
        size_bytes = 0
        for parameter in reversed(self._parameters):
            num_bytes = parameter.numel() * parameter.element_size()
            is_full = most_bytes is not None and size_bytes + num_bytes > most_bytes
            if not groups or groups[-1][-1].dtype != parameter.dtype or is_full:
                groups.append([])
                size_bytes = 0
            groups[-1].append(parameter)
            size_bytes += num_bytes
        only = len(groups) == 1 and groups[0][0].dtype == torch.float32
        self._tail_rides_along = only
        num_tail = self._num_sums + len(self._parameters)
        return [_make_bucket(members, num_tail if only else 0) for members in groups]

    def _make_tail(self) -> torch.Tensor:
        num_tail = self._num_sums + len(self._parameters)
        if self._tail_rides_along:
            return self._buckets[-1].flat[-num_tail:]
        return torch.zeros(num_tail, device=self._group.device)

    def _make_hook(self, bucket: _Bucket) -> Callable[[torch.Tensor], None]:
        def hook(_: torch.Tensor) -> None:
            if not self._last_backward:
                return
            bucket.num_missing -= 1
            # In order, on every worker alike: a bucket waits for those before it.
            while self._ready_in_order < len(self._buckets):
                following = self._buckets[self._ready_in_order]
                if following.num_missing > 0:
                    return
                self._launch(following)
                self._ready_in_order += 1

        return hook

    def _launch(self, bucket: _Bucket) -> None:
        for parameter, view in zip(bucket.parameters, bucket.slices, strict=True):
            if parameter.grad is None:
                view.zero_()
            else:
                require_dense(parameter, parameter.grad)
                view.copy_(parameter.grad)
        if not self._tail_rides_along:
            self._start(bucket)

    def _start(self, bucket: _Bucket) -> None:
        bucket.pending = self._group.start_sum(bucket.flat, "gradients")


def require_dense(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    """Raise `JobError` where the gradient is sparse."""
    if gradient.is_sparse:
        raise JobError(
            f"a parameter of shape {tuple(parameter.shape)} has a sparse gradient",
            cause="an embedding with sparse=True: sparse gradients cannot be summed over workers",
            next_step="use sparse=False, or --layout dp_replicate=1",
        )


def _make_bucket(members: list[nn.Parameter], num_tail: int) -> _Bucket:
    numel = sum(p.numel() for p in members)
    flat = torch.zeros(numel + num_tail, dtype=members[0].dtype, device=members[0].device)
    slices, offset = [], 0
    for parameter in members:
        # An optimizer's one pass over memory takes it that a gradient lies as its parameter does.
        stride = torch.empty_like(parameter, device="meta").stride()
        slices.append(flat.as_strided(parameter.shape, stride, offset))
        offset += parameter.numel()
    return _Bucket(members, flat, slices)
