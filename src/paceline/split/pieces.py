"""A model as pieces: modules that are run whole, and the code around them that calls them.

The pieces are what pipelines cut between, what is gathered and released by itself when parameters are sharded, and what
is recomputed. They are found by the shape of the module tree alone: a module that holds a list of blocks is code
around pieces, its blocks and everything else that it calls are pieces. Where one piece outweighs the rest
it is opened in its turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn


@dataclasses.dataclass(frozen=True)
class Piece:
    """One piece, by the name of its module."""

    name: str
    module: nn.Module


def find_pieces(model: nn.Module, at_least: int = 1) -> list[Piece]:
    """The pieces of `model`, in the order of its modules; at least so many where the model has them.

    A module that stands in several places has the first of its names.
    """
    pieces = list(_open(Piece("", model)))
    while True:
        total = sum(map(_num_elements, pieces)) or 1
        pieces.sort(key=_num_elements, reverse=True)
        heaviest = next((p for p in pieces if _can_open(p)), None)
        if heaviest is None or (
            len(pieces) >= at_least and _num_elements(heaviest) * max(at_least, 2) <= total
        ):
            break
        pieces.remove(heaviest)
        pieces += _open(heaviest)
    order = {module: number for number, module in enumerate(model.modules())}
    unique = {piece.module: piece for piece in sorted(pieces, key=lambda p: order[p.module], reverse=True)}
    return sorted(unique.values(), key=lambda p: order[p.module])


def pieces_for(model: nn.Module, num_stages: int) -> list[Piece]:
    """The pieces that a pipeline of so many stages is cut between: those that the planner has measured, while there are
    enough of them. Only of a model with fewer are some opened: stages would be more even if more were, but a cut
    within a block sends more, and nobody would know beforehand what it gains.
    """
    pieces = find_pieces(model)
    return pieces if len(pieces) >= num_stages else find_pieces(model, num_stages)


def _open(piece: Piece) -> Iterator[Piece]:
    """The pieces within: blocks of lists, and the other modules beside the lists."""
    for name, child in piece.module.named_children():
        inner = Piece(f"{piece.name}.{name}" if piece.name else name, child)
        is_block = _is_list(piece.module) and piece.name != ""
        if isinstance(child, nn.ModuleList | nn.ModuleDict) or (not is_block and _holds_blocks(child)):
            yield from _open(inner)
        else:
            yield inner


def _is_list(module: nn.Module) -> bool:
    return isinstance(module, nn.ModuleList | nn.ModuleDict | nn.Sequential) and len(module) > 1


def _holds_blocks(module: nn.Module) -> bool:
    """Whether a list of several blocks with parameters is in it, at any depth outside of a list's blocks."""
    if _is_list(module):
        return sum(any(True for _ in child.parameters()) for child in module.children()) > 1
    return any(_holds_blocks(child) for child in module.children())


def _can_open(piece: Piece) -> bool:
    """Its children do all of its work: what it calls itself is code without parameters of its own."""
    module = piece.module
    own = any(True for _ in module.parameters(recurse=False))
    return not own and sum(any(True for _ in child.parameters()) for child in module.children()) > 1


def _num_elements(piece: Piece) -> int:
    return sum(p.numel() for p in piece.module.parameters())
