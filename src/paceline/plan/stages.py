"""Blocks joined to pipeline stages: what a stage takes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence


@dataclasses.dataclass(frozen=True)
class Stage:
    """What one worker computes of one pipeline stage for one micro-batch; seconds and bytes."""

    forward_s: float
    input_s: float
    weight_s: float
    tensor_s: float
    """Of these three together: what tensor parallelism exchanges."""
    parameter_bytes: int
    trained_bytes: int
    saved_bytes: float
    peak_bytes: float
    output_bytes: float
    """What crosses the cut after it."""
    forward_tensor_s: float
    """Of `tensor_s`: in the forward pass."""
    again_s: float
    """Of `input_s`: computing again what the forward pass did not keep, exchanges aside."""
    num_blocks: int
    largest_bytes: int
    """Parameters of the largest block."""
    worst: tuple[float, float, float]
    """At the worst moment of a first backward pass, when what is saved goes and gradients come: bytes of what is
    saved, of gradients, and of temporaries."""
    overhead_s: float = 0.0
    """Of the three together: what running them as actions of a schedule takes beside the blocks."""
    weight_overhead_s: float = 0.0
    """Of that: of `weight_s`; the other two have equal shares."""

    @property
    def busy_s(self) -> float:
        return self.forward_s + self.input_s + self.weight_s


def join(
    pieces: Sequence[Stage], output_bytes: float, action_s: float = 0.0, weight_action_s: float = 0.0
) -> Stage:
    """Blocks one after the other.

    Args:
        output_bytes: what crosses the cut after them.
        action_s: what a forward and a backward pass take beside them.
        weight_action_s: what gradients of weights take, where they are actions of their own.
    """

    def total(name: str) -> float:
        return float(sum(getattr(piece, name) for piece in pieces))

    return Stage(
        forward_s=total("forward_s") + action_s,
        input_s=total("input_s") + action_s,
        weight_s=total("weight_s") + weight_action_s,
        tensor_s=total("tensor_s"),
        parameter_bytes=int(total("parameter_bytes")),
        trained_bytes=int(total("trained_bytes")),
        saved_bytes=total("saved_bytes"),
        peak_bytes=max(piece.peak_bytes for piece in pieces),
        output_bytes=output_bytes,
        forward_tensor_s=total("forward_tensor_s"),
        again_s=total("again_s"),
        num_blocks=len(pieces),
        largest_bytes=max(piece.largest_bytes for piece in pieces),
        worst=max(_moments(pieces), key=sum),
        overhead_s=2 * action_s + weight_action_s,
        weight_overhead_s=weight_action_s,
    )


def _moments(pieces: Sequence[Stage]) -> Iterator[tuple[float, float, float]]:
    """As `Stage.worst`, in the backward pass of each piece: what was saved up to it, gradients from it on."""
    saved = sum(piece.saved_bytes for piece in pieces)
    gradients = 0.0
    for piece in reversed(pieces):
        gradients += piece.trained_bytes
        yield saved, gradients, piece.peak_bytes
        saved -= piece.saved_bytes
