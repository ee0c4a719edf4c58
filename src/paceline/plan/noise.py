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

import math

from pydantic import Field

from paceline.records import Record

FEWEST_EFFECTIVE = 5.0
"""Measurements that an average must be worth before a noise scale is told."""
_WIDTH = 2.0
"""Standard errors on either side: about 95 %."""
_FORGETTING = 3
"""The n-th measurement counts about as n² does: half of the average comes from the last fifth of a run."""


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
    """That went into it."""


class Smoothing:
    """Averages measurements, later ones counting more, since the noise scale grows as the loss falls.

    Polynomial-decay averaging (Shamir and Zhang 2013): the window is a share of what has been seen, so that the
    beginning of the training is forgotten, and a long run is averaged over many steps.
    """

    def __init__(self) -> None:
        self._count = 0
        self._share = 1.0
        """Sum of the squared weights: one over the number of measurements that the average is worth."""
        self._trace = self._squared = 0.0
        self._trace_trace = self._trace_squared = self._squared_squared = 0.0
        """Averages of products, of which the averages' errors are made."""

    def add(self, found: Measurement) -> None:
        """Take one more measurement."""
        self._count += 1
        new = _FORGETTING / (self._count + _FORGETTING - 1)
        self._share = (1 - new) ** 2 * self._share + new**2
        # Deviations from the averages so far (West 1979): products of large numbers are never subtracted.
        trace, squared = found.trace - self._trace, found.squared_gradient - self._squared
        self._trace += new * trace
        self._squared += new * squared
        for name, product in (
            ("_trace_trace", trace * trace),
            ("_trace_squared", trace * squared),
            ("_squared_squared", squared * squared),
        ):
            setattr(self, name, (1 - new) * (getattr(self, name) + new * product))

    @property
    def trace(self) -> float:
        """tr Σ, averaged."""
        return self._trace

    @property
    def squared_gradient(self) -> float:
        """|G|², averaged."""
        return self._squared

    def scale(self) -> NoiseScale:
        """The ratio of the averages.

        Its interval is Fieller's (1954), exact for normal averages: the ratios R for which `tr Σ - R |G|²` is within
        two of its standard errors of zero. It has no upper end where |G|² itself might be zero.
        """
        unknown = NoiseScale(measurements=self._count)
        if self._share * FEWEST_EFFECTIVE > 1 or self._squared <= 0 or self._trace <= 0:
            return unknown
        width = _WIDTH**2 * self._share / (1 - self._share)
        a = self._squared**2 - width * self._squared_squared
        b = self._trace * self._squared - width * self._trace_squared
        c = self._trace**2 - width * self._trace_trace
        if a <= 0:
            return unknown
        root = math.sqrt(max(0.0, b * b - a * c))
        return NoiseScale(
            samples=self._trace / self._squared,
            low=max(0.0, (b - root) / a),
            high=(b + root) / a,
            measurements=self._count,
        )
