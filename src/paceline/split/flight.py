"""One micro-batch on one pipeline stage: what came, what went, and its backward pass."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import nn

from paceline.split.formats import as_it_lies


class Links(Protocol):
    """How one worker's stages reach those of others, or of its own."""

    def send(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> None:
        """Begin to send a contiguous tensor from stage `source`, which is here, to stage `target`."""

    def receive(self, tensor: torch.Tensor, source: int, target: int, kind: str) -> torch.Tensor:
        """Fill `tensor` with what comes next of this kind from stage `source` to stage `target`, which is here."""


@dataclasses.dataclass
class Flight:
    """One micro-batch on one stage, between its forward and its backward."""

    received: dict[int, list[Arrival]] = dataclasses.field(default_factory=dict)
    """By the stage that sent them, in order: values that take a gradient."""
    sent: dict[int, list[torch.Tensor]] = dataclasses.field(default_factory=dict)
    """By the stage that got them, in order: values that get a gradient."""
    loss: torch.Tensor | None = None
    """What the last stage differentiates."""


@dataclasses.dataclass
class Arrival:
    """A received value, and its gradient once the backward pass has come to it."""

    gradient: torch.Tensor | None = None
    value: torch.Tensor | None = None
    """Where the backward pass is in parts."""


class Arrive(torch.autograd.Function):
    """Lets a received tensor take part in the graph; the gradient is kept when it has come."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, tensor: torch.Tensor, arrival: Arrival) -> torch.Tensor:
        ctx.arrival = arrival
        ctx.mark_dirty(tensor)
        return tensor

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[None, None, None]:
        ctx.arrival.gradient = gradient
        return None, None, None


def backward(flight: Flight, stage: int, links: Links, device: torch.device) -> None:
    """The backward pass of one micro-batch on one stage.

    Gradients of what was sent come in, gradients of what was received go out.
    """
    roots, gradients = _gradients_in(flight, stage, links, device)
    if roots:
        torch.autograd.backward(roots, gradients)
    _gradients_out(flight, stage, links, device)


def backward_of_inputs(
    flight: Flight, stage: int, links: Links, device: torch.device, weights: list[nn.Parameter]
) -> Callable[[], None] | None:
    """As `backward`, without the gradients of `weights`.

    Returns:
        What computes these later; None: there is nothing left to do.
    """
    roots, gradients = _gradients_in(flight, stage, links, device)
    arrivals = [a for _, found in sorted(flight.received.items()) for a in found]
    if not arrivals:
        # Nobody waits for this stage.
        if roots:
            torch.autograd.backward(roots, gradients)
        return None
    groups: list[Any] = []
    if roots:
        # One number with the same gradients: torch detaches what it is given, which the graph may have saved.
        weighed = [r if g is None else (r * g).sum() for r, g in zip(roots, gradients, strict=True)]
        root = torch.stack([w.reshape(()) for w in weighed]).sum()
        # Here, as it takes more than a second and most runs do without.
        from torch.distributed.pipelining._backward import stage_backward_input

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # gradients of tensors that are no leaves are meant
            found, groups = stage_backward_input([root], None, [a.value for a in arrivals], iter(weights))
        groups = _merged(groups)
        for arrival, gradient in zip(arrivals, found, strict=True):
            arrival.gradient, arrival.value = gradient, None
    _gradients_out(flight, stage, links, device)
    return lambda: _of_weights(weights, groups)


def _merged(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Groups that have something in common become one.

    Where weights reach what comes from the inputs in several places, torch 2.13 leaves groups that have some of these
    places, or weights, in common. Each would go back through the same part of the graph: that fails, or counts twice.
    """
    merged: list[dict[str, Any]] = []
    for group in groups:
        weights = set(group["params"])
        gradients = dict(zip(group["intermediates"], group["grads"], strict=True))
        apart = []
        for other in merged:
            if weights.isdisjoint(other["params"]) and gradients.keys().isdisjoint(other["intermediates"]):
                apart.append(other)
            else:
                weights |= other["params"]
                gradients |= dict(zip(other["intermediates"], other["grads"], strict=True))
        whole = {"params": weights, "intermediates": list(gradients), "grads": list(gradients.values())}
        merged = [*apart, whole]
    return merged


def _of_weights(weights: list[nn.Parameter], groups: list[Any]) -> None:
    from torch.distributed.pipelining._backward import stage_backward_weight

    # From several places of one group torch goes back through those of others, too, which are still to come.
    again = any(len(group["intermediates"]) > 1 for group in groups)
    stage_backward_weight(iter(weights), groups, retain_graph=again)
    for weight in weights:
        # Optimizers that work in one pass over memory take it that a gradient lies as its parameter does (torch 2.13).
        if weight.grad is not None and weight.grad.stride() != weight.stride():
            weight.grad = torch.empty_like(weight, requires_grad=False).copy_(weight.grad)


def _gradients_in(
    flight: Flight, stage: int, links: Links, device: torch.device
) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
    """What to differentiate, and the gradients of it that others have sent."""
    roots: list[torch.Tensor] = []
    gradients: list[torch.Tensor | None] = []
    if flight.loss is not None:
        roots.append(flight.loss)
        gradients.append(None)
    for target, tensors in sorted(flight.sent.items()):
        flags = torch.zeros(len(tensors), dtype=torch.uint8, device=device)
        flags = links.receive(flags, target, stage, "B")
        for tensor, flag in zip(tensors, flags.tolist(), strict=True):
            if flag:
                empty = torch.empty(tensor.shape, dtype=tensor.dtype, device=device)
                roots.append(tensor)
                gradients.append(as_it_lies(tensor, links.receive(empty, target, stage, "B")))
    return roots, gradients


def _gradients_out(flight: Flight, stage: int, links: Links, device: torch.device) -> None:
    for source, arrivals in sorted(flight.received.items()):
        flags = torch.tensor([a.gradient is not None for a in arrivals], dtype=torch.uint8, device=device)
        links.send(flags, stage, source, "B")
        for arrival in arrivals:
            if arrival.gradient is not None:
                links.send(arrival.gradient.contiguous(), stage, source, "B")
