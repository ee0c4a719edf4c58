"""Tensors that do not lie end to end, brought into line for an operation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch


def contiguous(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor, or a copy of it that lies end to end."""
    return tensor if tensor.is_contiguous() else tensor.detach().contiguous()


@contextmanager
def staged(tensors: Sequence[torch.Tensor]) -> Iterator[list[torch.Tensor]]:
    """Stand-ins that lie end to end; what is in them at the end is written back.

    Costs a microsecond where they lie so already, otherwise one copy of the tensor each way.
    """
    whole = [contiguous(tensor) for tensor in tensors]
    yield whole
    for tensor, copy in zip(tensors, whole, strict=True):
        if copy is not tensor:
            tensor.detach().copy_(copy)
