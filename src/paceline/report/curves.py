"""Long noisy curves made fit to draw: smoothing and thinning out, with gaps where values are not finite."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def smooth(values: Floats, window: int) -> Floats:
    """The centred mean over `window` values (fewer at the ends), of those that are finite.

    Stays NaN where the value itself is not finite, so that a gap remains a gap.
    """
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    index = np.arange(len(values))
    low = np.maximum(index - window // 2, 0)
    high = np.minimum(index + window // 2 + 1, len(values))
    mean = (sums[high] - sums[low]) / np.maximum(counts[high] - counts[low], 1)
    return np.where(finite, mean, np.nan)


def thin(x: Floats, y: Floats, limit: int = 1000) -> tuple[Floats, Floats]:
    """At most about `limit` points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(x) <= limit:
        return x, y
    kept: list[int] = [0]
    for part in np.array_split(np.arange(len(x)), limit // 2 - 1):
        finite = part[np.isfinite(y[part])]
        if len(finite) == 0:
            kept.append(int(part[0]))
            continue
        kept += sorted({int(finite[np.argmin(y[finite])]), int(finite[np.argmax(y[finite])])})
    kept = sorted({*kept, len(x) - 1})
    return x[kept], y[kept]
