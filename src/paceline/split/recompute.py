"""Recomputation: what a piece keeps for its backward pass, and what it computes again."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn
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


def recomputed(
    forward: Callable[..., Any],
    how: str,
    module: nn.Module,
    within: Callable[[], contextlib.AbstractContextManager[Any]],
) -> Callable[..., Any]:
    """`forward` of `module`, such that its backward pass computes again what was not kept.

    Args:
        how: `full` keeps the inputs alone; `selective` the results of products of matrices too.
        within: what the second computation has to run in.
    """
    if how == "none" or not torch.is_grad_enabled():
        return forward
    is_again = False

    def run(*args: Any, **kwargs: Any) -> Any:
        nonlocal is_again
        if not is_again:
            is_again = True
            return forward(*args, **kwargs)
        # Statistics that the forward pass keeps must not be counted twice.
        with within(), _buffers_as_they_are(module):
            return forward(*args, **kwargs)

    more: dict[str, Any] = {}
    if how == "selective":
        more["context_fn"] = functools.partial(create_selective_checkpoint_contexts, _keep_products)
    return functools.partial(checkpoint, run, use_reentrant=False, **more)


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _PRODUCTS else CheckpointPolicy.PREFER_RECOMPUTE


@contextlib.contextmanager
def _buffers_as_they_are(module: nn.Module) -> Iterator[None]:
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
