"""How the tensors of several workers become one: the operations, and which types of number each can take."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch

Combine = Callable[..., Any]
"""`combine(a, b, out=c)`, element by element."""


@dataclasses.dataclass(frozen=True, eq=False)
class Reduction:
    """An operation that makes one tensor of those of all workers.

    The workers' tensors are combined in the order of their ranks, `((t0 + t1) + t2) + …`, in their own type, each
    element by itself: the bits do not depend on the size, on how a tensor is cut into pieces, or on who combines.
    """

    name: str
    number: int
    """In the flight recorder, and in what workers tell each other."""
    combine: Combine
    divides: bool = False
    """Whether the sum is divided by the number of workers at the end."""


SUM = Reduction("sum", 0, torch.add)
AVG = Reduction("average", 1, torch.add, divides=True)
MIN = Reduction("minimum", 2, torch.minimum)
MAX = Reduction("maximum", 3, torch.maximum)
PRODUCT = Reduction("product", 4, torch.mul)
BAND = Reduction("bitwise and", 5, torch.bitwise_and)
BOR = Reduction("bitwise or", 6, torch.bitwise_or)
BXOR = Reduction("bitwise xor", 7, torch.bitwise_xor)

REDUCTIONS = (SUM, AVG, MIN, MAX, PRODUCT, BAND, BOR, BXOR)
"""By their numbers."""


@functools.cache
def can_reduce(reduction: Reduction, dtype: torch.dtype) -> bool:
    """Whether torch has the operation for this type on a CPU. Averages are of floating-point numbers only."""
    if reduction.divides and not (dtype.is_floating_point or dtype.is_complex):
        return False
    one = torch.empty(1, dtype=dtype)
    try:
        reduction.combine(one, one, out=one)
    except (RuntimeError, TypeError):
        return False
    return True


def reduce_into(out: torch.Tensor, parts: Sequence[torch.Tensor], reduction: Reduction) -> None:
    """Combine `parts` (all of one shape, in the order of rank) into `out`, which may be one of them.

    One of the first two, that is, if there are more than two: the others are read after `out` was written.
    """
    if len(parts) == 1:
        out.copy_(parts[0])
    else:
        reduction.combine(parts[0], parts[1], out=out)
        for part in parts[2:]:
            reduction.combine(out, part, out=out)
    if reduction.divides:
        out.div_(len(parts))
