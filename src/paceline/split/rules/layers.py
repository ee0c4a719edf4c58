"""Functions of layers: embeddings, convolutions, normalisation, pooling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.nn import functional as F

from paceline.split.batchnorm import normalise
from paceline.split.placement import evenly
from paceline.split.rules.table import rule_for, weighted_rule_for
from paceline.split.tensor_mode import RULES, WEIGHTED, SplitMode, on_whole_tensors


def _embedding(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """A table that is divided by rows: each worker looks up what it has, and zeros for the rest."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    index, weight = given.pop("input"), given.pop("weight")
    if given.get("max_norm") is None and not given.get("scale_grad_by_freq"):
        mode.weigh(weight, evenly(0, mode.shape(weight)[0]), saves_only_memory=True)
    shard = mode.shard(weight)
    index = mode.whole(index)
    if shard is None:
        return func(index, weight, **given)
    if shard.dim == 1:
        return mode.made(func(index, weight, **given), shard.at(index.dim()), weight)
    if len(shard.parts) > 1:
        return func(index, mode.whole(weight), **given)
    begin, end = mode.own_range(shard)
    padding = given.pop("padding_idx", None)
    if padding is not None:
        padding = padding % shard.size
        given["padding_idx"] = padding - begin if begin <= padding < end else None
    elsewhere = (index < begin) | (index >= end)
    found = func((index - begin).masked_fill(elsewhere, 0), weight, **given)
    return mode.add_up_product(found.masked_fill(elsewhere.unsqueeze(-1), 0.0))


WEIGHTED[F.embedding] = _embedding


@weighted_rule_for("conv1d", "conv2d", "conv3d")
def convolution(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Divided by channels, like a linear layer; where each channel is for itself, along with its input."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    groups = given.pop("groups", 1)
    channels = x.dim() - weight.dim() + 1
    of_x = mode.shard(x)
    num_out, in_per_group = mode.shape(weight)[:2]
    per_channel = groups > 1 and in_per_group == 1 and num_out == groups
    divided_alike = of_x is not None and of_x.dim == channels
    if groups == 1:
        mode.weigh(weight, of_x.at(1) if of_x is not None and divided_alike else evenly(0, num_out))
    elif per_channel and of_x is not None and divided_alike:
        mode.weigh(weight, of_x.at(0))
    of_weight = mode.shard(weight)
    if per_channel and of_weight is not None:
        x = mode.cut(x, of_weight.at(channels))
        bias = None if bias is None else mode.cut(bias, of_weight)
        result = func(x, weight, bias, **given, groups=mode.divide(groups))
        return mode.made(result, of_weight.at(channels), weight, x)
    if of_weight is None or groups > 1:
        if of_x is not None and of_x.dim < channels:
            shared = None if bias is None else mode.share(bias)
            result = func(x, mode.share(mode.whole(weight)), shared, **given, groups=groups)
            return mode.made(result, of_x, x)
        whole = None if bias is None else mode.whole(bias)
        return func(mode.whole(x), mode.whole(weight), whole, **given, groups=groups)
    if of_weight.dim == 1:
        result = mode.add_up(func(mode.cut(x, of_weight.at(channels)), weight, None, **given))
        if bias is None:
            return result
        return result + mode.whole(bias).view(-1, *[1] * (weight.dim() - 2))
    bias = None if bias is None else mode.cut(bias, of_weight)
    result = func(mode.share(mode.whole(x)), weight, bias, **given)
    return mode.made(result, of_weight.at(channels), weight)


@rule_for("layer_norm", "rms_norm")
def layer_norm(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    names = ["input", "normalized_shape", "weight", "bias", "eps"]
    if func.__name__ == "rms_norm":
        names.remove("bias")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, shape = given.pop("input"), given.pop("normalized_shape")
    shard = mode.shard(x)
    parameters = {name: given.pop(name) for name in ("weight", "bias") if given.get(name) is not None}
    if shard is None or shard.dim >= x.dim() - len(shape):
        parameters = {name: mode.whole(p) for name, p in parameters.items()}
        return func(mode.whole(x), shape, **parameters, **given)
    whole = [mode.whole(p) for p in parameters.values()]
    shared = dict(zip(parameters, mode.share_together(whole), strict=True))
    return mode.made(func(x, shape, **shared, **given), shard, x)


@rule_for("group_norm")
def group_norm(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    names = ("input", "num_groups", "weight", "bias", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x, groups = given["input"], given["num_groups"]
    shard = mode.shard(x)
    if shard is None or shard.dim != 1 or len(shard.parts) > 1 or groups % mode.num_workers:
        return on_whole_tensors(mode, func, args, kwargs)
    for name in ("weight", "bias"):
        if given.get(name) is not None:
            given[name] = mode.cut(given[name], shard.at(0))
    given["num_groups"] = mode.divide(groups)
    return mode.made(func(**given), shard, x)


@rule_for("batch_norm", "instance_norm")
def batch_norm(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Each channel is normalised for itself. The running statistics stay whole on every worker."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    x = given["input"]
    shard = mode.shard(x)
    if shard is None or shard.dim != 1 or func.__module__ != F.__name__:
        return on_whole_tensors(mode, func, args, kwargs)
    given.update({n: mode.cut(given[n], shard.at(0)) for n in ("weight", "bias") if given.get(n) is not None})
    statistics = {n: given[n] for n in ("running_mean", "running_var") if given.get(n) is not None}
    pieces = {name: mode.cut(buffer, shard.at(0)).clone() for name, buffer in statistics.items()}
    result = func(**{**given, **pieces})
    with torch.no_grad():
        for name, buffer in statistics.items():
            buffer.copy_(mode.whole(mode.made(pieces[name], shard.at(0))))
    return mode.made(result, shard, x)


def _normalise(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """The same over the global batch: statistics are exchanged with those who have the same channels."""
    x, weight, bias, *rest = args
    shard = mode.shard(x)
    if shard is None or shard.dim != 1:
        return on_whole_tensors(mode, func, args, kwargs)
    weight, bias = (None if p is None else mode.cut(p, shard.at(0)) for p in (weight, bias))
    y, mean, variance, count = func(x, weight, bias, *rest)
    of_channels = shard.at(0)
    return mode.made(y, shard, x), mode.made(mean, of_channels, x), mode.made(variance, of_channels, x), count


RULES[normalise] = _normalise


@rule_for("max_pool1d", "max_pool2d", "max_pool3d", "avg_pool1d", "avg_pool2d", "avg_pool3d", "adaptive_avg_pool1d",
          "adaptive_avg_pool2d", "adaptive_avg_pool3d", "adaptive_max_pool1d", "adaptive_max_pool2d", "interpolate",
          "lp_pool1d", "lp_pool2d", "upsample", "pixel_unshuffle_")  # fmt: skip
def per_channel(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Samples and channels, the first two dimensions, are computed each for itself."""
    x = args[0] if args else kwargs["input"]
    shard = mode.shard(x)
    if shard is None or shard.dim > 1 or x.dim() < 3:
        return on_whole_tensors(mode, func, args, kwargs)
    return mode.made(func(*args, **kwargs), shard, x)
