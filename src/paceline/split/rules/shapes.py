"""Functions that change shapes and order, and those that ask for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.split.placement import Shape, Shard, evenly, follow_view, is_divisible, regroup
from paceline.split.rules.elementwise import common, fit
from paceline.split.rules.table import positive, rule_for
from paceline.split.tensor_mode import RULES, SplitMode, on_whole_tensors

Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@rule_for("size", "numel", "__len__", "nelement")
def size(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = mode.shape(args[0])
    name = func.__name__
    if name in ("numel", "nelement"):
        return math.prod(shape)
    if name == "__len__":
        return shape[0]
    dim = args[1] if len(args) > 1 else kwargs.get("dim")
    return torch.Size(shape) if dim is None else shape[dim]


def _shape(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return torch.Size(mode.shape(args[0]))


def _same(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return mode.made(func(*args, **kwargs), mode.shard(args[0]), args[0])


def _swap_last(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    num_dims = args[0].dim()
    order = list(range(num_dims))
    if num_dims > 1:
        order[-2:] = [num_dims - 1, num_dims - 2]
    return _permuted(mode, func(*args, **kwargs), args[0], order)


RULES[torch.Tensor.shape.__get__] = _shape  # type: ignore[attr-defined]
RULES[torch.Tensor.data.__get__] = _same  # type: ignore[attr-defined]
for _name in ("T", "mT", "H", "mH"):
    RULES[getattr(torch.Tensor, _name).__get__] = _swap_last


def _permuted(mode: SplitMode, result: Any, source: torch.Tensor, order: Sequence[int]) -> Any:
    shard = mode.shard(source)
    return mode.made(result, None if shard is None else shard.at(list(order).index(shard.dim)), source)


@rule_for("transpose", "swapaxes", "swapdims", "t")
def transpose(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x = args[0]
    num_dims = x.dim()
    if func.__name__ == "t":
        a, b = 0, num_dims - 1
    else:
        given = [*args[1:], *kwargs.values()]
        a, b = (positive(int(d), num_dims) for d in given[:2])
    order = list(range(num_dims))
    order[a], order[b] = order[b], order[a]
    return _permuted(mode, func(*args, **kwargs), x, order)


@rule_for("permute", "movedim", "moveaxis")
def permute(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    # Where each dimension goes is read off a tensor whose sizes are the numbers of its dimensions.
    numbers = torch.empty(tuple(range(1, x.dim() + 1)), device="meta")
    order = [int(n) - 1 for n in func(numbers, *args[1:], **kwargs).shape]
    return _permuted(mode, func(*args, **kwargs), x, order)


@rule_for("view", "reshape", "flatten", "unflatten", "view_as", "reshape_as", "squeeze", "unsqueeze", "ravel")
def view(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    shard, before = mode.shard(x), mode.shape(x)
    name = func.__name__
    if shard is None or (len(args) > 1 and isinstance(args[1], torch.dtype)) or "dtype" in kwargs:
        return on_whole_tensors(mode, func, args, kwargs)
    if name in ("view_as", "reshape_as"):
        after = mode.shape(args[1])
    else:
        after = tuple(func(torch.empty(before, device="meta"), *args[1:], **kwargs).shape)
    carried = follow_view(shard, before, after, mode.num_workers)
    if carried is None:
        better = regroup(shard, before, after, mode.num_workers)
        if better is not None:
            mode.would_fit(x, better)
        return mode.whole(x).reshape(after)
    local = mode.local(after, carried)
    result = x.view(local) if name in ("view", "view_as") else x.reshape(local)
    return mode.made(result, carried, x)


@rule_for("expand", "expand_as", "broadcast_to")
def expand(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    shard, before = mode.shard(x), mode.shape(x)
    if func.__name__ == "expand_as":
        after = mode.shape(args[1])
    else:
        after = tuple(func(torch.empty(before, device="meta"), *args[1:], **kwargs).shape)
    if shard is None:
        return x.expand(after)
    carried = shard.at(shard.dim + len(after) - len(before))
    return mode.made(x.expand(mode.local(after, carried)), carried, x)


@rule_for("repeat", "tile")
def repeat(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    shard = mode.shard(x)
    given = args[1:] or tuple(kwargs.values())
    times = list(given[0]) if isinstance(given[0], tuple | list) else list(given)
    times = [1] * (x.dim() - len(times)) + times
    dim = 0 if shard is None else shard.dim + len(times) - x.dim()
    if shard is None or times[dim] != 1:
        return on_whole_tensors(mode, func, args, kwargs)
    return mode.made(func(*args, **kwargs), shard.at(dim), x)


@rule_for("repeat_interleave")
def repeat_interleave(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    x, shard = args[0], mode.shard(args[0])
    times = args[1] if len(args) > 1 else kwargs.get("repeats")
    dim = args[2] if len(args) > 2 else kwargs.get("dim")
    if shard is None or dim is None or not isinstance(times, int):
        return on_whole_tensors(mode, func, args, kwargs)
    if positive(dim, x.dim()) == shard.dim:
        # Whole pieces are repeated element by element: each worker's copies stay its own.
        shard = Shard(shard.dim, tuple(part * times for part in shard.parts))
    return mode.made(func(*args, **kwargs), shard, x)


@rule_for("split", "chunk", "split_with_sizes", "tensor_split")
def split(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shard = args[0], mode.shard(args[0])
    shape = mode.shape(x)
    dim = positive(int(kwargs.get("dim", args[2] if len(args) > 2 else 0)), len(shape))
    if shard is None:
        return func(*args, **kwargs)
    if shard.dim != dim:
        return mode.made(func(*args, **kwargs), shard, x)
    lengths = [int(t.shape[dim]) for t in func(torch.empty(shape, device="meta"), *args[1:], **kwargs)]
    pieces = _parts_of_each(shard, lengths, mode.num_workers)
    if pieces is None:
        wanted = Shard(dim, tuple(lengths))
        if is_divisible(wanted, mode.num_workers):
            mode.would_fit(x, wanted)
        return func(mode.whole(x), *args[1:], **kwargs)
    cut = x.split([mode.local((*shape[:dim], p.size), p)[dim] for p in pieces], dim)
    return tuple(mode.made(t, p, x) for t, p in zip(cut, pieces, strict=True))


def _parts_of_each(shard: Shard, lengths: Sequence[int], num_workers: int) -> list[Shard] | None:
    """The parts that fall into each of `lengths`; None where a boundary lies within a part."""
    remaining = list(shard.parts)
    result = []
    for length in lengths:
        taken: list[int] = []
        while remaining and sum(taken) + remaining[0] <= length:
            taken.append(remaining.pop(0))
        if sum(taken) != length or not taken:
            return None
        result.append(Shard(shard.dim, tuple(taken)))
    return result


@rule_for("unbind")
def unbind(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shard = args[0], mode.shard(args[0])
    dim = positive(int(kwargs.get("dim", args[1] if len(args) > 1 else 0)), x.dim())
    if shard is None or shard.dim == dim:
        return on_whole_tensors(mode, func, args, kwargs)
    return mode.made(func(*args, **kwargs), shard.at(shard.dim - (dim < shard.dim)), x)


def _iterate(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return iter(unbind(mode, torch.unbind, args, kwargs))


RULES[torch.Tensor.__iter__] = _iterate


@rule_for("cat", "concat", "concatenate", "stack", "hstack", "vstack")
def cat(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    tensors = list(args[0] if args else kwargs["tensors"])
    if func.__name__ in ("hstack", "vstack") or "out" in kwargs:
        return on_whole_tensors(mode, func, args, kwargs)
    num_dims = max(t.dim() for t in tensors)
    stacks = func.__name__ == "stack"
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0))
    dim = positive(int(given), num_dims + stacks)
    target = common(mode, tensors)
    if target is None or any(t.dim() != num_dims for t in tensors):
        return on_whole_tensors(mode, func, args, kwargs)
    if target.dim == dim and not stacks:
        shards = [mode.shard(t) for t in tensors]
        parts = tuple(p for s in shards if s is not None and s.dim == dim for p in s.parts)
        if sum(parts) != sum(mode.shape(t)[dim] for t in tensors):
            return on_whole_tensors(mode, func, args, kwargs)
        # Each worker's pieces end to end are the parts of one division.
        return mode.made(func(tensors, dim), Shard(dim, parts), *tensors)
    sized = [t for t in tensors if mode.shape(t)[target.dim] == target.size]
    if len(sized) != len(tensors):
        return on_whole_tensors(mode, func, args, kwargs)
    fitted = [fit(mode, t, target, num_dims) for t in tensors]
    after = target.at(target.dim + 1) if stacks and dim <= target.dim else target
    return mode.made(func(fitted, dim), after, *tensors)


@rule_for("narrow", "select", "index_select", "gather", "take_along_dim", "diff", "unfold")
def along(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`(x, dim, …)`: the other dimensions may be divided, if nothing but x has them."""
    x, shard = args[0], mode.shard(args[0])
    name = func.__name__
    if shard is None or name in ("gather", "take_along_dim", "diff") or len(args) < 2:
        return on_whole_tensors(mode, func, args, kwargs)
    dim = positive(int(args[1]), x.dim())
    if dim == shard.dim:
        return on_whole_tensors(mode, func, args, kwargs)
    after = shard.at(shard.dim - 1) if name == "select" and dim < shard.dim else shard
    return mode.made(func(*args, **kwargs), after, x)


@rule_for("__getitem__")
def getitem(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, index = args
    shard, shape = mode.shard(x), mode.shape(x)
    items = list(index) if isinstance(index, tuple) else [index]
    if shard is None or any(not _is_basic(i) for i in items):
        return on_whole_tensors(mode, func, args, kwargs)
    used = sum(i is not None and i is not Ellipsis for i in items)
    if Ellipsis in items:
        place = items.index(Ellipsis)
        items[place : place + 1] = [slice(None)] * (len(shape) - used)
    items += [slice(None)] * (len(shape) - sum(i is not None for i in items))
    dim = after = 0
    for number, item in enumerate(items):
        if item is None:
            after += 1
            continue
        if dim == shard.dim:
            return _getitem_at(mode, x, items, number, shard.at(after), shape[dim])
        dim += 1
        after += not isinstance(item, int)
    raise AssertionError("the divided dimension was not met")


def _getitem_at(mode: SplitMode, x: Any, items: list[Any], number: int, after: Shard, size: int) -> Any:
    """`x[items]`, where `items[number]` falls on the divided dimension, which then has the place `after.dim`."""
    item = items[number]
    if isinstance(item, int):
        return mode.whole(x)[tuple(items)]
    begin, end, step = item.indices(size)
    if (begin, end, step) == (0, size, 1):
        items[number] = slice(None)
        return mode.made(x[tuple(items)], after, x)
    lengths = [length for length in (begin, end - begin, size - end) if length]
    shard = mode.shard(x)
    assert shard is not None
    pieces = _parts_of_each(shard, lengths, mode.num_workers) if step == 1 else None
    if pieces is None:
        wanted = Shard(shard.dim, tuple(lengths))
        if step == 1 and is_divisible(wanted, mode.num_workers):
            mode.would_fit(x, wanted)
        return mode.whole(x)[tuple(items)]
    place = int(begin > 0)
    before = sum(mode.local((p.size,), evenly(0, p.size))[0] for p in pieces[:place])
    length = mode.local((pieces[place].size,), evenly(0, pieces[place].size))[0]
    items[number] = slice(before, before + length)
    return mode.made(x[tuple(items)], Shard(after.dim, pieces[place].parts), x)


def _is_basic(item: Any) -> bool:
    return (
        item is None
        or item is Ellipsis
        or isinstance(item, slice)
        or (isinstance(item, int) and not isinstance(item, bool))
    )


@rule_for("pad")
def pad(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shard = args[0], mode.shard(args[0])
    amounts = args[1] if len(args) > 1 else kwargs["pad"]
    if shard is None or shard.dim >= x.dim() - len(amounts) // 2:
        return on_whole_tensors(mode, func, args, kwargs)
    return mode.made(func(*args, **kwargs), shard, x)


__all__ = ["Shape", "view"]
