"""Replicas that are trained for a moment, to be measured, and thrown away."""

from __future__ import annotations

import torch

from paceline.job import Job
from paceline.train.replica import Replica
from paceline.train.session import Datasets

_STEPS = 1000
"""What the schedule of a job without a length is given: it is not followed that far."""


def replica_to_measure(
    job: Job, datasets: Datasets, *, seed: int, device: torch.device, precision: str, in_parts: bool = False
) -> Replica:
    """As a training would have it; see `Replica`."""
    return Replica(
        job,
        seed=seed,
        device=device,
        precision=precision,
        total_steps=job.steps or _STEPS,
        in_parts=in_parts,
        images=datasets.images,
    )
