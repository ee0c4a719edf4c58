"""Group norms whose backward pass may be asked for their parameters' gradients alone.

On CPUs, of inputs with their channels last and fewer than 2048 positions, torch (2.13) then writes the gradient of the
input all the same, to where there is none, and the process dies. That happens where the input needs no gradient, and
where a schedule computes gradients of inputs and of weights apart. Inputs come channel by channel there.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import nn


class GroupNorms:
    """The group norms of a model. The modules stay what they are: class, parameter names and hooks."""

    def __init__(self, model: nn.Module) -> None:
        self.in_parts = False
        """Whether gradients of inputs and of weights are computed apart."""
        self.names: list[str] = []
        """Of the modules that were reached."""
        for name, module in model.named_modules():
            if isinstance(module, nn.GroupNorm):
                module.forward = functools.partial(self._forward, module.forward)  # type: ignore[method-assign]
                self.names.append(name)

    def _forward(self, forward: Any, x: torch.Tensor) -> torch.Tensor:
        is_alone = torch.is_grad_enabled() and (self.in_parts or not x.requires_grad)
        if is_alone and x.device.type == "cpu":
            x = x.contiguous()
        return forward(x)  # type: ignore[no-any-return]
