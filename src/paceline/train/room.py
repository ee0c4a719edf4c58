"""Is there memory for the whole model in one process?"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from paceline.job import Job
from paceline.measure.machine import available_memory_bytes

TRAINING_BYTES = 16
"""Per parameter in float32: itself, its gradient, and two moments of an optimizer such as Adam."""
MEASURING_BYTES = 20
"""The same with a quarter more, for activations and what an allocator does not fill."""
PROOF_BYTES = 32
"""The same for a proof, on the worker that compares: two models and the tensors of both steps."""

_DRAWS = {
    getattr(torch.Tensor, name)
    for name in (
        "bernoulli_", "cauchy_", "exponential_", "geometric_", "log_normal_", "normal_", "random_", "uniform_",
    )
}  # fmt: skip


def why_no_room(job: Job, device: str, bytes_per_parameter: int) -> str:
    """Why one process cannot hold the whole model, with so much for each parameter; empty if it can, or may."""
    try:
        with torch.random.fork_rng(), torch.device("meta"), _Unfilled():
            num_parameters = sum(p.numel() for p in job.model().parameters())
    except Exception:
        return ""  # a model that cannot be built without memory
    needed, free = num_parameters * bytes_per_parameter, available_memory_bytes(device)
    if not free or needed <= free:
        return ""
    return f"it takes about {needed / 2**30:.1f} GiB, and one process has {free / 2**30:.1f} GiB"


class _Unfilled(TorchFunctionMode):
    """Random numbers are not drawn into tensors without memory: torch would import a computer algebra system for it."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        named = kwargs or {}
        if func in _DRAWS or getattr(func, "__module__", None) == nn.init.__name__:
            filled = named["tensor"] if "tensor" in named else args[0]
            if filled.is_meta:
                return filled
        return func(*args, **named)
