"""Entering rules into the tables, by the names that torch gives its functions."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.nn import functional as F

from paceline.split.tensor_mode import RULES, WEIGHTED, Rule


def functions(names: Iterable[str]) -> list[Callable[..., Any]]:
    """All that torch offers under these names: `torch.x`, `Tensor.x`, `F.x`, `torch.special.x`, in place too."""
    found: dict[Callable[..., Any], None] = {}
    for name in names:
        for place in (torch, torch.Tensor, F, torch.special):
            for variant in (name, name + "_"):
                function = getattr(place, variant, None)
                if callable(function):
                    found[function] = None
    return list(found)


def rule_for(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for the functions of these names, where an argument is divided."""

    def enter(rule: Rule) -> Rule:
        for function in functions(names):
            RULES[function] = rule
        return rule

    return enter


def weighted_rule_for(*names: str) -> Callable[[Rule], Rule]:
    """Decorator: the rule for the functions of these names, which read a weight."""

    def enter(rule: Rule) -> Rule:
        for function in functions(names):
            WEIGHTED[function] = rule
        return rule

    return enter


def positive(dim: int, num_dims: int) -> int:
    return dim + num_dims if dim < 0 else dim


def words(text: str) -> list[str]:
    """The words of a long list of names."""
    return text.split()
