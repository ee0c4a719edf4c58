"""Tensors nested in other things: the leaves, and what puts others in their places."""

from __future__ import annotations

import collections
import dataclasses

import pytest
import torch

from paceline.split.trees import flatten

Pair = collections.namedtuple("Pair", "a b")


@dataclasses.dataclass
class Holder:
    x: torch.Tensor
    name: str = "n"


X, Y = torch.ones(2), torch.zeros(3)
VALUES = {
    "a tensor": X,
    "nothing": (),
    "arguments": ((X, None, 3), {"a": Y, "b": [1.5, "s", torch.float32]}),
    "named": (Pair(X, 1), [Y]),
    "ordered": collections.OrderedDict(a=X, b=(Y,)),
    "a dataclass": ([Holder(X)], {"k": Y}),
}


def kinds(value):
    if isinstance(value, dict):
        return type(value), {key: kinds(v) for key, v in value.items()}
    if isinstance(value, tuple | list):
        return type(value), [kinds(v) for v in value]
    if isinstance(value, Holder):
        return Holder, kinds(value.x), value.name
    return value if not isinstance(value, torch.Tensor) else ("tensor", id(value))


@pytest.mark.parametrize("name", VALUES)
def test_what_is_taken_apart_is_put_together_again(name):
    leaves, restore = flatten(VALUES[name])
    assert kinds(restore(leaves)) == kinds(VALUES[name])
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    other = {id(t): t.clone() for t in tensors}
    new = restore([other.get(id(leaf), leaf) for leaf in leaves])
    assert [id(t) for t in flatten(new)[0] if isinstance(t, torch.Tensor)] == [
        id(other[id(t)]) for t in tensors
    ]


def test_what_is_changed_afterwards_is_put_together_as_it_was():
    """A model may fill a list that it was given."""
    given = ([X], {"seen": [Y]})
    leaves, restore = flatten(given)
    given[0].append(Y)
    given[1]["more"] = X
    assert kinds(restore(leaves)) == kinds(([X], {"seen": [Y]}))
