"""Which samples make up which global batch, and which of them are whose. Pure arithmetic.

The order of an epoch is a function of (seed, epoch) alone; a global batch is a run of that order; it is
cut into micro-batches and each of those into one share per worker. Nothing else depends on the number
of workers.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import numpy.typing as npt

from paceline.train.seeds import derive


def epoch_order(seed: int, epoch: int, num_samples: int) -> npt.NDArray[np.int64]:
    """A permutation of `0 … num_samples-1`.

    The sort order of raw Philox words (Salmon et al. 2011), whose stream NumPy keeps the same for good;
    `Generator.permutation` may change between versions.
    """
    words = np.random.Philox(key=derive(seed, "order", epoch)).random_raw(num_samples)
    return np.argsort(words, kind="stable")


def cut(num_samples: int, num_parts: int) -> list[tuple[int, int]]:
    """Bounds `(begin, end)` of `num_parts` contiguous parts whose sizes differ by at most one.

    The longer parts come first, so that parts are empty only at the end.
    """
    size, longer = divmod(num_samples, num_parts)
    bounds, begin = [], 0
    for part in range(num_parts):
        end = begin + size + (part < longer)
        bounds.append((begin, end))
        begin = end
    return bounds


@dataclasses.dataclass(frozen=True)
class Share:
    """One worker's part of one micro-batch, as positions in the global batch."""

    begin: int
    end: int
    borrowed: bool
    """This worker's part is empty: it computes on the micro-batch's first sample with weight zero,
    so that it takes part in the collectives of the forward and backward pass."""

    @property
    def samples(self) -> int:
        """Samples that count: zero where the sample is borrowed."""
        return 0 if self.borrowed else self.end - self.begin


def shares(batch_samples: int, micro: int, size: int, rank: int) -> list[Share]:
    """This worker's shares of a global batch; micro-batches without any sample are left out on all ranks."""
    result = []
    for begin, end in cut(batch_samples, micro):
        if begin == end:
            continue
        first, last = cut(end - begin, size)[rank]
        borrowed = first == last
        if borrowed:
            first, last = 0, 1
        result.append(Share(begin + first, begin + last, borrowed))
    return result


def batches_per_epoch(num_samples: int, batch_size: int) -> int:
    """The last batch may be smaller than the others."""
    return -(-num_samples // batch_size)
