"""Giving an optimizer other parameters than those it was built with."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

Cut = Callable[[torch.Tensor], torch.Tensor]


def swap_parameters(optimizer: Any, replaced: Mapping[nn.Parameter, tuple[nn.Parameter, Cut] | None]) -> None:
    """Let `optimizer` train other parameters in place of those it has, group by group.

    The user's optimizer is built on the whole model's parameters, so that whatever it decides by their places or
    shapes is decided as in one process. The dicts of the groups stay the same objects, as schedulers hold them.

    Args:
        replaced: the new parameter, and how state of the old one's shape is cut to its; None: the parameter is
            not trained here. Parameters that are not mentioned stay.
    """
    for group in optimizer.param_groups:
        kept = []
        for old in group["params"]:
            if old not in replaced:
                kept.append(old)
                continue
            found = replaced[old]
            state = optimizer.state.pop(old, None)
            if found is None:
                continue
            new, cut = found
            kept.append(new)
            if state is not None:
                # Some optimizers make state before the first step.
                optimizer.state[new] = {
                    key: cut(value) if isinstance(value, torch.Tensor) and value.shape == old.shape else value
                    for key, value in state.items()
                }
        group["params"] = kept
