"""Recomputation: what a piece keeps for its backward pass, and what it computes again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

_PRODUCTS = {
    getattr(torch.ops.aten, name).default
    for name in (
        "mm",
        "addmm",
        "bmm",
        "baddbmm",
        "convolution",
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_for_cpu",
        "_scaled_dot_product_efficient_attention",
        "_scaled_dot_product_cudnn_attention",
    )
    if hasattr(torch.ops.aten, name)
}
"""What is dear to compute beside what its results weigh."""


def recomputed(forward: Callable[..., Any], how: str, module: nn.Module) -> Callable[..., Any]:
    """`forward` of `module`, such that its backward pass computes again what was not kept.

    Args:
        how: `full` keeps the inputs alone; `selective` the results of products of matrices too.
    """
    if how == "none" or not torch.is_grad_enabled():
        return forward

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        first: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        second: contextlib.AbstractContextManager[Any] = contextlib.nullcontext()
        if how == "selective":
            first, second = create_selective_checkpoint_contexts(_keep_products)
        return first, _again(module, _get_current_function_mode_stack(), second)

    return functools.partial(checkpoint, forward, use_reentrant=False, context_fn=contexts)


@contextlib.contextmanager
def _again(
    module: nn.Module,
    modes: list[Any],
    inner: contextlib.AbstractContextManager[Any],
) -> Iterator[None]:
    """What the second computation runs in: the `modes` of the first; and what that has counted is not counted twice."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        with contextlib.ExitStack() as stack:
            active = _get_current_function_mode_stack()
            for mode in modes:
                if mode not in active:
                    stack.enter_context(mode)
            stack.enter_context(inner)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE
