"""Products of matrices, with and without weights: where a network is divided.

A weight that is divided by its outputs (columns, in the terms of Shoeybi et al. 2019) reads a whole input and gives
divided outputs; one that is divided by its inputs (rows) reads a divided input, and the workers' results are added up.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch

from paceline.split.placement import Shard, evenly
from paceline.split.rules.elementwise import fit
from paceline.split.rules.table import rule_for, weighted_rule_for
from paceline.split.tensor_mode import SplitMode, on_whole_tensors


@weighted_rule_for("linear")
def linear(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, weight, bias = _bound(args, kwargs, ("input", "weight", "bias"))
    return _weighted_product(mode, func, x, weight, bias, outputs_dim=0)


def _bound(args: tuple[Any, ...], kwargs: dict[str, Any], names: tuple[str, ...]) -> list[Any]:
    return [args[i] if i < len(args) else kwargs.get(name) for i, name in enumerate(names)]


def _weighted_product(
    mode: SplitMode,
    func: Callable[..., Any],
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    outputs_dim: int,
) -> Any:
    """`func(x, weight[, bias])`; `outputs_dim`: the dimension of `weight` that the outputs have."""
    inputs_dim = 1 - outputs_dim
    last = x.dim() - 1
    of_x = mode.shard(x)
    if weight.dim() == 2:
        if of_x is not None and of_x.dim == last:
            mode.weigh(weight, of_x.at(inputs_dim))
        else:
            mode.weigh(weight, evenly(outputs_dim, mode.shape(weight)[outputs_dim]))
    of_weight = mode.shard(weight)
    extra = () if bias is None else (bias,)
    if of_weight is None:
        if of_x is None:
            return func(x, weight, *extra)
        if of_x.dim == last:
            return func(mode.whole(x), weight, *extra)
        # Divided along positions or samples: each worker computes with the whole weight.
        result = func(x, mode.share(weight), *(mode.share(b) for b in extra))
        return mode.made(result, of_x, x)
    if of_weight.dim == inputs_dim:
        return mode.add_up_product(func(mode.cut(x, of_weight.at(last)), weight), bias)
    result = func(mode.share_whole(x), weight, *(mode.cut(b, of_weight.at(0)) for b in extra))
    return mode.made(result, of_weight.at(last), weight)


@weighted_rule_for("matmul", "mm", "__matmul__")
def matmul(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = _bound(args, kwargs, ("input", "other" if "other" in kwargs else "mat2"))
    if mode.is_weight(b) and b.dim() == 2 and a.dim() >= 2:
        return _weighted_product(mode, func, a, b, None, outputs_dim=1)
    if mode.shard(a) is None and mode.shard(b) is None:
        return func(*args, **kwargs)
    return _product(mode, func, a, b)


@rule_for("bmm")
def bmm(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    a, b = _bound(args, kwargs, ("input", "mat2"))
    return _product(mode, func, a, b)


def _product(mode: SplitMode, func: Callable[..., Any], a: torch.Tensor, b: torch.Tensor) -> Any:
    """`[…, m, k] × […, k, n]`, either of them divided."""
    if a.dim() < 2 or b.dim() < 2:
        return func(mode.whole(a), mode.whole(b))
    num_dims = max(a.dim(), b.dim())
    of_a, of_b = mode.shard(a), mode.shard(b)
    if of_a is not None:
        from_end = a.dim() - of_a.dim
        if from_end == 1:
            partial = func(a, mode.cut(b, of_a.at(b.dim() - 2)))
            return mode.add_up(partial)
        if from_end == 2:
            if of_b is not None:
                b = mode.whole(b)
            return mode.made(func(a, mode.share(b)), of_a.at(num_dims - 2), a)
        target = of_a.at(num_dims - from_end)
    else:
        assert of_b is not None
        from_end = b.dim() - of_b.dim
        if from_end == 2:
            return mode.add_up(func(mode.cut(a, of_b.at(a.dim() - 1)), b))
        if from_end == 1:
            return mode.made(func(mode.share(a), b), of_b.at(num_dims - 1), b)
        target = of_b.at(num_dims - from_end)
    return mode.made(func(fit(mode, a, target, num_dims), fit(mode, b, target, num_dims)), target, a, b)


@weighted_rule_for("addmm")
def addmm(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`bias + x × weight`, the weight as [inputs, outputs]."""
    bias, x, weight = _bound(args, kwargs, ("input", "mat1", "mat2"))
    plain = not (set(kwargs) - {"input", "mat1", "mat2"}) and len(args) <= 3
    if not plain or not mode.is_weight(weight) or bias.dim() != 1:
        return _if_divided(mode, func, args, kwargs)

    def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return x @ weight if bias is None else func(bias, x, weight)

    return _weighted_product(mode, product, x, weight, bias, outputs_dim=1)


def _if_divided(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    tensors = [t for t in (*args, *kwargs.values()) if isinstance(t, torch.Tensor)]
    if all(mode.shard(t) is None for t in tensors):
        return func(*args, **kwargs)
    return on_whole_tensors(mode, func, args, kwargs)


@rule_for("baddbmm", "addbmm")
def baddbmm(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`beta · input + alpha · a × b`, all with a batch in front."""
    beta, alpha = kwargs.pop("beta", 1), kwargs.pop("alpha", 1)
    extra, a, b = args if len(args) == 3 else _bound(args, kwargs, ("input", "batch1", "batch2"))
    if func.__name__ == "addbmm":
        return on_whole_tensors(mode, func, (extra, a, b), {"beta": beta, "alpha": alpha})
    return mode.compose(lambda: (extra * beta if beta else 0) + torch.bmm(a, b) * alpha)


@rule_for("einsum")
def einsum(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A letter is divided in all operands that have it; one that the result lacks is added up over."""
    equation, *operands = args
    if not isinstance(equation, str) or "." in equation:
        return on_whole_tensors(mode, func, args, kwargs)
    if len(operands) == 1 and isinstance(operands[0], tuple | list):
        operands = list(operands[0])
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    letters = inputs.split(",")
    if not arrow:
        return on_whole_tensors(mode, func, args, kwargs)
    chosen: tuple[str, Shard] | None = None
    for operand, names in zip(operands, letters, strict=True):
        shard = mode.shard(operand)
        if shard is not None and chosen is None:
            chosen = names[shard.dim], shard
    if chosen is None or any(names.count(chosen[0]) > 1 for names in letters):
        return on_whole_tensors(mode, func, args, kwargs)
    letter, shard = chosen
    fitted = [
        mode.cut(operand, shard.at(names.index(letter)))
        if letter in names
        else mode.share(mode.whole(operand))
        for operand, names in zip(operands, letters, strict=True)
    ]
    result = func(equation, *fitted)
    if letter in output:
        return mode.made(result, shard.at(output.index(letter)), *operands)
    return mode.add_up(result)


@rule_for("scaled_dot_product_attention")
def attention(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Heads and samples are computed each for itself; keys and values may have fewer heads than queries."""
    names = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal")
    given: dict[str, Any] = {**dict(zip(names, args, strict=False)), **kwargs}
    q, k, v, mask = (given.pop(name, None) for name in names[:4])
    target = next((s for s in map(mode.shard, (q, k, v)) if s is not None), None)
    num_dims = q.dim()
    fitted_mask = None
    if target is not None and target.dim < num_dims - 2:
        heads = [mode.shape(t)[target.dim] for t in (q, k, v)]
        fits = all(len(target.parts) == 1 and count % mode.num_workers == 0 for count in heads)
        if len(set(heads)) == 1 or fits:
            shards = [target if count == target.size else evenly(target.dim, count) for count in heads]
            q, k, v = (mode.cut(t, s) for t, s in zip((q, k, v), shards, strict=True))
            if mask is not None:
                fitted_mask = fit(mode, mask, shards[0], num_dims)
            drops = bool(given.get("dropout_p", 0.0))
            with mode.random() if drops else contextlib.nullcontext():
                result = func(q, k, v, fitted_mask, **given)
            return mode.made(result, shards[0], q, k, v)
    q, k, v = (mode.whole(t) for t in (q, k, v))
    return func(q, k, v, None if mask is None else mode.whole(mask), **given)
