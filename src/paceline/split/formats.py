"""How tensors of images lie in memory: channel by channel, or with their channels last."""

from __future__ import annotations

import torch


def memory_format_of(tensor: torch.Tensor) -> torch.memory_format:
    """`channels_last` where that is how the tensor lies, and it would lie otherwise by itself."""
    if tensor.dim() != 4 or tensor.is_contiguous():
        return torch.contiguous_format
    is_turned = tensor.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if is_turned else torch.contiguous_format


def as_it_lies(tensor: torch.Tensor, received: torch.Tensor) -> torch.Tensor:
    """What was received, with its channels where `tensor` has them: of its shape, such as its value or its gradient.

    What workers exchange is contiguous on all of them, whatever each has; and an operation that gets its inputs in two
    formats first turns one of them over.
    """
    return received.contiguous(memory_format=memory_format_of(tensor))
