"""What a whole model finds out in its first step, if nothing has before: how images lie, what multiplies matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline.comm.group import Group
from paceline.train.images import ImageFormat
from paceline.train.matmul import AUTO, ONEDNN, Matmul, wanted_library


def decide_on_matmul(
    matmul: Matmul, batch: Any, try_out: Callable[[Any], float], group: Group, *, may_try: bool, may: bool
) -> None:
    """Rank 0 tries both libraries out on its share of the batch; all take what it finds. A collective call.

    Args:
        try_out: a forward and a backward pass that leave nothing behind; the loss.
        may_try: the model is whole, and has matrices large enough. Else torch's library stays, unless the environment
            says another.
        may: whether the device and the precision let another library be taken.
    """
    wanted = wanted_library()
    ratio = None
    if may and group.rank == 0:
        if wanted == ONEDNN:
            ratio = 1.0
        elif wanted == AUTO and may_try:
            ratio = matmul.measure(lambda: try_out(batch))
    matmul.decide(_of_rank_0(ratio, group, "which library multiplies matrices"))


def decide_on_images(
    images: ImageFormat, batch: Any, try_out: Callable[[Any], float], group: Group, *, is_whole: bool
) -> None:
    """Rank 0 tries on its share of the batch how images are to lie; all take that. A collective call."""
    if not is_whole:
        images.decide(None)
        return
    ratio = images.measure(batch, try_out) if group.rank == 0 else None
    images.decide(_of_rank_0(ratio, group, "how images lie in memory"))


def _of_rank_0(ratio: float | None, group: Group, what: str) -> float | None:
    found: float | None = group.gather_json(ratio, what)[0] if group.size > 1 else ratio
    return found
