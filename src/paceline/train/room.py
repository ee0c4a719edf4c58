"""Is there memory for the whole model in one process?"""

from __future__ import annotations

import torch

from paceline.job import Job
from paceline.measure.machine import available_memory_bytes

TRAINING_BYTES = 16
"""Per parameter in float32: itself, its gradient, and two moments of an optimizer such as Adam."""
MEASURING_BYTES = 20
"""The same with a quarter more, for activations and what an allocator does not fill."""
PROOF_BYTES = 32
"""The same for a proof, on the worker that compares: two models and the tensors of both steps."""


def why_no_room(job: Job, device: str, bytes_per_parameter: int) -> str:
    """Why one process cannot hold the whole model, with so much for each parameter; empty if it can, or may."""
    try:
        with torch.random.fork_rng(), torch.device("meta"):
            num_parameters = sum(p.numel() for p in job.model().parameters())
    except Exception:
        return ""  # a model that cannot be built without memory
    needed, free = num_parameters * bytes_per_parameter, available_memory_bytes(device)
    if not free or needed <= free:
        return ""
    return f"it takes about {needed / 2**30:.1f} GiB, and one process has {free / 2**30:.1f} GiB"
