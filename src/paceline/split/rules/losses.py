"""Losses on scores that are divided by class: no worker ever holds all of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paceline.split.rules.table import rule_for
from paceline.split.tensor_mode import SplitMode, on_whole_tensors


@rule_for("cross_entropy")
def cross_entropy(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Scores [N, C, …] divided by class, targets [N, …] by number."""
    names = (
        "input",
        "target",
        "weight",
        "size_average",
        "ignore_index",
        "reduce",
        "reduction",
        "label_smoothing",
    )
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    scores, target = given["input"], given["target"]
    shard = mode.shard(scores)
    unusual = ("weight", "size_average", "reduce", "label_smoothing")
    classes = 1 if scores.dim() > 1 else 0
    if (
        shard is None
        or shard.dim != classes
        or len(shard.parts) > 1
        or target.is_floating_point()
        or any(given.get(name) for name in unusual if not isinstance(given.get(name), torch.Tensor))
        or given.get("weight") is not None
    ):
        return on_whole_tensors(mode, func, args, kwargs)
    ignored = given.get("ignore_index", -100)
    counts = target != ignored
    safe = target.masked_fill(~counts, 0)
    rows = mode.cross_entropy_of_rows(scores.movedim(classes, -1), safe, shard).masked_fill(~counts, 0.0)
    reduction = given.get("reduction", "mean")
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / counts.sum()
