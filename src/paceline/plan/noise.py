"""The gradient noise scale, from the squared norms of a batch's gradient and of the gradients of its parts.

McCandlish et al. 2018, "An empirical model of large-batch training", appendix A.1. One sample's gradient has mean G and
covariance Σ; the noise scale is `tr Σ / |G|²`, in samples. A batch of B samples has the gradient g, and its n parts,
which count for w_i with `Σ w_i = 1`, have g_i. With `m = Σ w_i |g_i|²`

    E |g|² = |G|² + tr Σ / B,    E m = |G|² + n tr Σ / B,

whatever the sizes of the parts, so that these have no bias:

    tr Σ ≈ B (m - |g|²) / (n - 1),    |G|² ≈ (n |g|² - m) / (n - 1).

Equal parts give the paper's formulas. Each is averaged over many steps before one is divided by the other: the ratio
of two noisy numbers has a bias of its own.
"""

from __future__ import annotations

import array
import math

import numpy as np
from pydantic import Field

from paceline.records import Record

FEWEST = 10
"""Measurements before a noise scale is told."""
_WIDTH = 2.0
"""Standard errors on either side: about 95 %."""


class Measurement(Record):
    """Of one step: without bias, and noisy; |G|² may come out negative."""

    step: int = Field(ge=1)
    """1-based."""
    samples: int = Field(ge=1)
    """B."""
    parts: int = Field(ge=2)
    """n."""
    squared_gradient: float
    """|G|²."""
    trace: float
    """tr Σ."""

    @classmethod
    def of(
        cls, step: int, samples: int, parts: int, squared_parts: float, squared_whole: float
    ) -> Measurement:
        """
        Args:
            squared_parts: `Σ w_i |g_i|²`.
            squared_whole: |g|².
        """
        return cls(
            step=step,
            samples=samples,
            parts=parts,
            squared_gradient=(parts * squared_whole - squared_parts) / (parts - 1),
            trace=samples * (squared_parts - squared_whole) / (parts - 1),
        )


class NoiseScale(Record):
    """An estimate, in samples, and where it lies with 95 % confidence; all None where |G|² or tr Σ may be zero."""

    samples: float | None = None
    low: float | None = None
    high: float | None = None
    measurements: int = Field(ge=0)
    """Until now; the later half of them went into it."""


class Smoothing:
    """Averages the later half of all measurements: |G|² falls by orders of magnitude as training begins."""

    def __init__(self) -> None:
        self._traces, self._squares = array.array("d"), array.array("d")

    def add(self, found: Measurement) -> None:
        """Take one more measurement."""
        self._traces.append(found.trace)
        self._squares.append(found.squared_gradient)

    def scale(self) -> NoiseScale:
        """The ratio of the averages.

        Its interval is Fieller's (1954), exact for normal averages: the ratios R for which `tr Σ - R |G|²` is within
        two of its standard errors of zero. It has no upper end where |G|² itself might be zero.
        """
        count = len(self._traces)
        unknown = NoiseScale(measurements=count)
        if count < FEWEST:
            return unknown
        later = np.array([self._traces[count // 2 :], self._squares[count // 2 :]])
        trace, squared = later.mean(axis=1)
        if trace <= 0 or squared <= 0:
            return unknown
        (trace_trace, trace_squared), (_, squared_squared) = _WIDTH**2 / later.shape[1] * np.cov(later)
        a = squared**2 - squared_squared
        b = trace * squared - trace_squared
        c = trace**2 - trace_trace
        if a <= 0:
            return unknown
        root = math.sqrt(max(0.0, b * b - a * c))
        return NoiseScale(
            samples=trace / squared, low=max(0.0, (b - root) / a), high=(b + root) / a, measurements=count
        )
