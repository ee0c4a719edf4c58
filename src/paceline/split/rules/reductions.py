"""Functions that make one element of many: sums over a divided dimension are added up over the workers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from paceline.split.rules.table import positive, rule_for
from paceline.split.tensor_mode import SplitMode, on_whole_tensors


@rule_for("sum", "mean", "amax", "amin", "max", "min", "var", "std", "prod", "argmax", "argmin", "any", "all", "norm",
          "logsumexp", "nansum", "nanmean", "var_mean", "std_mean", "median", "count_nonzero", "topk", "kthvalue",
          "vector_norm")  # fmt: skip
def reduce(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    shard = mode.shard(x)
    name = func.__name__
    if shard is None or any(isinstance(a, torch.Tensor) for a in (*args[1:], *kwargs.values())):
        return on_whole_tensors(mode, func, args, kwargs)
    num_dims = len(mode.shape(x))
    dims, keeps = _which(name, args, kwargs, num_dims)
    if dims is None:
        return on_whole_tensors(mode, func, args, kwargs)
    if shard.dim not in dims:
        dim = shard.dim if keeps else shard.dim - sum(d < shard.dim for d in dims)
        return mode.made(func(*args, **kwargs), shard.at(dim), x)
    if name == "sum" and x.dtype != torch.bool:
        return mode.add_up(func(*args, **kwargs))
    if name == "mean":
        return mode.add_up(func(*args, **kwargs) / mode.num_workers)
    return on_whole_tensors(mode, func, args, kwargs)


def _which(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], num_dims: int
) -> tuple[list[int] | None, bool]:
    """The dimensions that go, and whether they stay with size 1. None: the call is not understood."""
    if name in ("topk", "kthvalue"):
        given = kwargs.get("dim", args[2] if len(args) > 2 else -1)
        return [positive(given, num_dims)], True if name == "topk" else bool(kwargs.get("keepdim", False))
    if name in ("norm", "vector_norm"):
        given = kwargs.get("dim", args[2] if len(args) > 2 else None)
        keeps = kwargs.get("keepdim", args[3] if len(args) > 3 else False)
    else:
        given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else None))
        keeps = kwargs.get("keepdim", args[-1] if len(args) > 2 and isinstance(args[-1], bool) else False)
    if isinstance(given, bool):
        return None, False
    if given is None:
        return list(range(num_dims)), bool(keeps)
    given = [given] if isinstance(given, int) else list(given)
    return [positive(int(d), num_dims) for d in given], bool(keeps)
