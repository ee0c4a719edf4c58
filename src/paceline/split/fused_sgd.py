"""What a fused step of torch's SGD cannot do: first gradients that come late, and sparse ones."""

from __future__ import annotations

from typing import Any

import torch


def prepare_fused_sgd(optimizer: Any, *_: Any) -> None:
    """Before a fused step of torch's SGD: give zeros to parameters that have no momentum yet, where others have theirs.

    That is what their first step makes the gradient of, as it does elsewhere: m = 0.9 · 0 + g. The fused step (torch
    2.13) knows first steps of all parameters of a group at once only, and raises in others: of an expert that no sample
    was sent to before. With `dampening` the first step is another one, and nothing is done.

    A group with a sparse gradient, of an embedding, is left to torch's other steps, as the fused one refuses it.
    """
    if not isinstance(optimizer, torch.optim.SGD):
        return
    for group in optimizer.param_groups:
        if not group.get("fused"):
            continue
        moved = [p for p in group["params"] if p.grad is not None]
        if any(p.grad.is_sparse for p in moved):
            group["fused"] = None
            continue
        if not group["momentum"] or group["dampening"]:
            continue
        new = [p for p in moved if optimizer.state.get(p, {}).get("momentum_buffer") is None]
        if len(new) < len(moved):
            for p in new:
                optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)
