"""Tensors nested in tuples, lists, dicts, dataclasses and whatever is registered with torch's pytree."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils import _pytree


def flatten(value: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves, and what puts others in their places."""
    plain: list[Any] = []
    if (structure := _structure(value, plain)) is not None:
        return plain, lambda new: _restored(structure, iter(new))
    leaves, spec = _pytree.tree_flatten(value)
    inner = [_fields(leaf) for leaf in leaves]
    if not any(fields is not None for fields in inner):
        return leaves, lambda new: _pytree.tree_unflatten(new, spec)
    flat: list[Any] = []
    parts: list[tuple[int, Callable[[list[Any]], Any]] | None] = []
    for leaf, fields in zip(leaves, inner, strict=True):
        if fields is None:
            flat.append(leaf)
            parts.append(None)
        else:
            below, rebuild = flatten(fields)
            flat += below
            parts.append((len(below), _rebuilder(leaf, rebuild)))

    def restore(new: list[Any]) -> Any:
        rest, result = list(new), []
        for part in parts:
            if part is None:
                result.append(rest.pop(0))
            else:
                count, rebuild = part
                result.append(rebuild(rest[:count]))
                del rest[:count]
        return _pytree.tree_unflatten(result, spec)

    return flat, restore


_LEAVES = (torch.Tensor, bool, int, float, str, torch.dtype, torch.device, torch.memory_format)


_LEAF = "leaf"


def _structure(value: Any, leaves: list[Any]) -> Any:
    """How tensors and simple values lie in tuples, lists and dicts; None: there is something else. They join `leaves`.

    Most arguments of a block are such; torch's pytree takes some tens of microseconds for them.
    """
    kind = type(value)
    if kind is tuple or kind is list or kind is dict:
        inside = [_structure(v, leaves) for v in (value.values() if kind is dict else value)]
        return None if None in inside else (kind, list(value) if kind is dict else None, inside)
    leaves.append(value)
    return _LEAF if value is None or isinstance(value, _LEAVES) else None


def _restored(structure: Any, new: Iterator[Any]) -> Any:
    if structure is _LEAF:
        return next(new)
    kind, keys, inside = structure
    values = [_restored(one, new) for one in inside]
    return kind(values) if keys is None else dict(zip(keys, values, strict=True))


def _fields(value: Any) -> dict[str, Any] | None:
    """The fields of a dataclass that holds tensors."""
    if not dataclasses.is_dataclass(value) or isinstance(value, type):
        return None
    fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return fields if tensors_in(fields) else None


def _rebuilder(value: Any, rebuild: Callable[[list[Any]], Any]) -> Callable[[list[Any]], Any]:
    return lambda new: dataclasses.replace(value, **rebuild(new))


def tensors_in(value: Any) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [leaf for leaf in flatten(value)[0] if isinstance(leaf, torch.Tensor)]


def map_tensors(value: Any, function: Callable[[torch.Tensor], Any]) -> Any:
    """`value` with `function` applied to its tensors."""
    if isinstance(value, torch.Tensor):
        return function(value)
    leaves, restore = flatten(value)
    return restore([function(leaf) if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves])


def map_arguments(value: Any, function: Callable[[Any], Any], kinds: Any = torch.Tensor) -> Any:
    """A call's arguments, in tuples, lists and dicts, with `function` applied to those of `kinds`; quicker."""
    if isinstance(value, kinds):
        return function(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(map_arguments(v, function, kinds) for v in value))
    if isinstance(value, tuple | list):
        return type(value)(map_arguments(v, function, kinds) for v in value)
    if isinstance(value, dict):
        return {k: map_arguments(v, function, kinds) for k, v in value.items()}
    return value
