"""How the kinds of spans, and what eats the ideal, are shown: in words, as a character and in a colour."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Look:
    """Of one kind, in every picture."""

    words: str
    block: str
    """One character in the terminal."""
    style: str
    """Its colour there."""
    token: str
    """Its colour in figures: a token of `paceline.report.theme`."""


SPANS = {
    "forward": Look("forward", "▒", "blue", "computation"),
    "recompute": Look("computed again", "▞", "cyan", "recompute"),
    "backward": Look("backward", "█", "blue", "backward"),
    "weights": Look("weight gradients", "▓", "bright_blue", "weights"),
    "overhead": Look("running actions", "▏", "", "overhead"),
    "tensor": Look("tensor-parallel exchange", "≈", "red", "tensor"),
    "message": Look("messages", "→", "yellow", "message"),
    "bubble": Look("bubble", "·", "dim", "idle"),
    "gather": Look("gathering parameters", "▼", "yellow", "gather"),
    "gradients": Look("adding up gradients", "▲", "red", "communication"),
    "optimizer": Look("optimizer", "◆", "magenta", "optimizer"),
    "data": Look("data", "▌", "green", "data"),
    "fixed": Look("fixed", "│", "", "other"),
    "unexplained": Look("unexplained", "?", "", "unexplained"),
    "wait": Look("waiting", "-", "dim", "rest"),
}
"""Of `paceline.plan.spans`, in the order of legends: computing, exchanging and waiting, updating."""

EFFICIENT = Look("brings speed-up", "█", "blue", "computation")
CAUSES = {
    "small batches": Look("small batches", "▓", "cyan", "recompute"),
    "uneven stages": Look("uneven stages", "▒", "bright_blue", "weights"),
    "slower computation": Look("slower computation", "░", "bright_blue", "backward"),
    "communication": Look("communication", "≈", "red", "communication"),
    "bubbles": Look("bubbles", "·", "dim", "idle"),
    "fixed costs": Look("fixed costs", "◆", "magenta", "other"),
    "unexplained": Look("unexplained", "?", "", "unexplained"),
}
"""Of `paceline.plan.losses`, in the order in which they are stacked."""
