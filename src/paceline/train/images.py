"""How batches of images lie in memory: as they come, or channels last.

Convolutions on CPUs work on all channels of a pixel at a time. A batch that comes channel by channel is turned over
before and after many of them; one that comes with its channels last stays so from layer to layer (docs/log.md has
times). Others gain nothing, a model that calls `view` on what a convolution gives cannot take it, and dropout on
images draws other masks. So both are tried out on the job's first batch, once: every layout takes what was found, so
that layouts are compared, and forecast, as they will train.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import torch

from paceline.train.data import map_tensors

LEAST_NUMEL = 1 << 16
"""Smaller batches are left as they are: nothing is gained, and what is gained could not be told from noise."""
MOST_RATIO = 0.9
"""Channels last must take at most this share of the time."""
_ROUNDS = 4
_ENOUGH_S = 2.0
_TOLERANCE = 1e-4


class ImageFormat:
    """Turns batches over, once it has been found that this pays. One for all layouts of a job."""

    def __init__(self) -> None:
        self.is_decided = False
        self.ratio: float | None = None
        """Time of a forward and a backward pass with channels last, over that without, where it pays; else None."""

    def arrange(self, batch: Any) -> Any:
        """The batch as the model is to get it."""
        return batch if self.ratio is None else _channels_last(batch)

    def measure(
        self, batch: Any, run: Callable[[Any], float], clock: Callable[[], float] = time.process_time
    ) -> float | None:
        """The ratio, from forward and backward passes by turns; None where it does not pay, or is not possible.

        Args:
            run: a forward and a backward pass on a batch; gives the loss, which must not change.
            clock: of processor time, since a process that has to stop now and then would be judged by chance.
        """
        if not has_images(batch):
            return None
        other = _channels_last(batch)
        ratios: list[float] = []
        begin_s = clock()
        for number in range(_ROUNDS):
            seconds, losses = [], []
            for arranged in (batch, other):
                start_s = clock()
                try:
                    losses.append(run(arranged))
                except RuntimeError:
                    if arranged is batch:
                        raise
                    return None
                seconds.append(clock() - start_s)
            if not abs(losses[1] - losses[0]) <= _TOLERANCE * abs(losses[0]):
                return None
            if (
                number > 0 or clock() - begin_s > _ENOUGH_S
            ):  # the first round warms up, if there is time for that
                ratios.append(seconds[1] / seconds[0])
            if clock() - begin_s > _ENOUGH_S:
                break
        ratio = median(ratios)
        return ratio if ratio <= MOST_RATIO else None

    def decide(self, ratio: float | None) -> None:
        """Take what was found, here or by another worker."""
        self.is_decided, self.ratio = True, ratio


def has_images(batch: Any) -> bool:
    """Whether a tensor in it may be a large enough batch of images."""
    found: list[torch.Tensor] = []
    map_tensors(batch, lambda tensor: found.append(tensor) or tensor)  # type: ignore[func-returns-value]
    return any(_is_image(tensor) and tensor.numel() >= LEAST_NUMEL for tensor in found)


def _is_image(tensor: torch.Tensor) -> bool:
    return tensor.dim() == 4 and tensor.is_floating_point() and tensor.device.type == "cpu"


def _channels_last(batch: Any) -> Any:
    return map_tensors(
        batch, lambda t: t.contiguous(memory_format=torch.channels_last) if _is_image(t) else t
    )
