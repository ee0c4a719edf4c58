"""What a step adds up over micro-batches and workers, and what it tells."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch

from paceline.errors import LossError
from paceline.train.calling import require_scalar
from paceline.train.data import Part
from paceline.train.noise import NUM_SUMS, NoiseMeter, StepNoise
from paceline.train.reduction import Sums

# The sums that travel with the gradients, and their places.
LOSS, WEIGHT, WEIGHTED, STOP, CHANGE = range(5)
NOISE = slice(5, 5 + NUM_SUMS)
SUMS = Sums(num=NOISE.stop, num_alike=3, weight=WEIGHT, weighted=WEIGHTED)


@dataclasses.dataclass(frozen=True)
class StepResult:
    """What one step did. Times are this worker's; `loss` is over the global batch, before the update."""

    loss: float
    samples: int
    lr: list[float]
    grad_norm: float | None
    """Before clipping; None where the job does not clip."""
    stop: bool
    """Some worker was asked to stop: all of them learn it in the same step."""
    step_s: float
    compute_s: float
    communication_s: float
    optimizer_s: float
    data_s: float
    noise: StepNoise | None = None
    """Of an earlier step, where the gradient noise scale was measured: its sums have travelled with this step's."""
    change: bool = False
    """Rank 0 was asked to have the layout reconsidered: as `stop`."""


class StepSums:
    """One worker's sums of a step.

    What is known here without asking the device is kept here, and goes there in one piece: reading a number would make
    a GPU wait in the middle of the step, and each operation on a few numbers takes as long as on a few thousand.
    """

    def __init__(self, device: torch.device) -> None:
        self._on_device = torch.zeros(SUMS.num, device=device)
        self._known = [0.0] * SUMS.num

    def weigh(self, loss: Any, part: Part, batch_samples: int, noise: NoiseMeter, *, is_whole: bool) -> Any:
        """Add a part's loss sum and weight; return what to differentiate.

        Args:
            loss: what the job gives: a mean over the samples, or a sum and its weight.
            is_whole: the part is the whole global batch: nothing is left to weigh.
        """
        samples = part.share.samples
        self._known[WEIGHTED] = float(isinstance(loss, tuple))
        if not isinstance(loss, tuple):
            require_scalar(loss, "the loss")
            self._on_device[LOSS].add_(loss.detach(), alpha=samples)
            self._known[WEIGHT] += samples
            return loss if is_whole else loss * (samples / batch_samples)
        loss_sum, weight = loss
        require_scalar(loss_sum, "the loss's sum")
        if part.share.borrowed:
            return loss_sum * 0.0
        self._on_device[LOSS].add_(loss_sum.detach())
        if isinstance(weight, torch.Tensor):
            weight = weight.detach()
            self._on_device[WEIGHT].add_(weight)
        else:
            self._known[WEIGHT] += weight
        noise.weigh(part, weight)
        return loss_sum / weight if is_whole else loss_sum

    @property
    def weighted(self) -> bool:
        """The loss came with weights, where it was computed here."""
        return self._known[WEIGHTED] > 0

    def close(self, noise: NoiseMeter, *, stop: bool, change: bool) -> torch.Tensor:
        """After the passes: the sums, float32, shape `[SUMS.num]`, on the device."""
        self._known[STOP], self._known[CHANGE] = float(stop), float(change)
        sums = self._on_device
        sums += torch.tensor(self._known).to(sums.device, non_blocking=True)
        noise.put(sums[NOISE])
        return sums


def mean_loss(sums: Sequence[float], step: int) -> float:
    """The global batch's loss, from its sums over all workers.

    Raises:
        LossError: the weights sum to zero, or the loss is not finite.
    """
    weight = sums[WEIGHT]
    if weight == 0:
        raise LossError(
            f"the weights of the loss sum to zero in step {step}",
            cause="a global batch without anything to learn from, such as padding only",
            next_step="drop such samples from the data set",
        )
    loss = sums[LOSS] / weight
    if not math.isfinite(loss):
        raise LossError(
            f"the loss is {loss} in step {step}",
            cause="a learning rate that is too high, or a division by zero or log of zero in the loss",
            next_step="lower the learning rate, set clip_norm, or add a warm-up to the schedule",
        )
    return loss
