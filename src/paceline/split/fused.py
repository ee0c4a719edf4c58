"""A step of the optimizer in one pass over memory."""

from __future__ import annotations

from typing import Any

import torch

from paceline.split.fused_sgd import prepare_fused_sgd
from paceline.split.granularity import Trial, out_of_reach


def prefer_fused(optimizer: Any) -> bool:
    """Let an optimizer of torch's do a step in one pass over memory, where its user left that open; whether it does.

    On a CPU torch takes a pass, and a temporary, for each operation of AdamW: eight or more. What one pass computes is
    tried out on small random parameters, and taken only where it is the same. A fused SGD, the user's own choice too,
    learns what it cannot do by itself.
    """
    if isinstance(optimizer, torch.optim.SGD):
        optimizer.register_step_pre_hook(prepare_fused_sgd)
    open_ = [
        group
        for group in optimizer.param_groups
        if group.get("fused", False) is None
        and not any(group.get(key) for key in ("foreach", "capturable", "differentiable"))
        and all(p.device.type == "cpu" and p.is_floating_point() for p in group["params"])
    ]
    if not open_ or len(open_) < len(optimizer.param_groups) or optimizer.state:
        return False
    real = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), out_of_reach(real):
        try:
            as_it_was = Trial(optimizer)
            for group in open_:
                group["fused"] = True
            is_same = Trial(optimizer).agrees_with(as_it_was)
        except Exception:
            is_same = False
    if not is_same:
        for group in open_:
            group["fused"] = None
    return is_same
