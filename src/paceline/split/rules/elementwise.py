"""Functions that compute each element by itself, with broadcasting."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.split.placement import Shard
from paceline.split.rules.table import positive, rule_for, words
from paceline.split.tensor_mode import SplitMode, works_in_place
from paceline.split.trees import map_arguments

_NAMES = words("""
    abs absolute acos acosh add addcdiv addcmul alpha_dropout angle arccos arcsin arctan asin asinh atan
    atan2 atanh bfloat16 bitwise_and bitwise_not bitwise_or bitwise_xor bool ceil celu clamp clamp_max
    clamp_min clip clone conj contiguous copysign cos cosh cpu cuda deg2rad detach digamma div divide
    double elu eq erf erfc erfinv exp exp2 expm1 expit fill float float_power floor floor_divide fmax fmin
    fmod frac ge gelu greater greater_equal gt half hardshrink hardsigmoid hardswish hardtanh heaviside
    hypot int isclose isfinite isinf isnan lgamma ldexp le leaky_relu lerp less less_equal log log10 log1p
    log2 logaddexp logaddexp2 logical_and logical_not logical_or logical_xor logit logsigmoid long lt
    masked_fill maximum minimum mish mul multiply mvlgamma nan_to_num ne neg negative nextafter not_equal
    ones_like positive pow prelu rad2deg reciprocal relu relu6 remainder round rrelu rsqrt rsub selu sgn
    short sigmoid sign signbit silu sin sinc sinh softplus softshrink softsign sqrt square sub subtract tan
    tanh tanhshrink threshold to true_divide trunc type type_as where xlogy zero zero_ zeros_like full_like
    empty_like threshold_ __add__ __radd__ __sub__ __rsub__ __mul__ __rmul__ __truediv__ __rtruediv__
    __floordiv__ __rfloordiv__ __mod__ __rmod__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __and__
    __rand__ __or__ __ror__ __xor__ __rxor__ __eq__ __ne__ __lt__ __le__ __gt__ __ge__ __iadd__ __isub__
    __imul__ __itruediv__ __ipow__ __iand__ __ior__ __ixor__ native_dropout
""")


@rule_for(*_NAMES)
def elementwise(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    tensors: list[torch.Tensor] = []
    map_arguments((args, kwargs), tensors.append)
    in_place = works_in_place(func)
    # In place, the result lies where it lay.
    target = mode.shard(tensors[0]) if in_place else None
    if target is None and not in_place:
        target = common(mode, tensors)
    if target is None:
        return func(*map_arguments(args, mode.whole), **map_arguments(kwargs, mode.whole))
    num_dims = max(len(mode.shape(t)) for t in tensors)
    fitted = {id(t): fit(mode, t, target, num_dims) for t in tensors}
    if in_place:
        fitted[id(tensors[0])] = tensors[0]
    result = func(
        *map_arguments(args, lambda t: fitted[id(t)]), **map_arguments(kwargs, lambda t: fitted[id(t)])
    )
    return result if in_place else mode.made(result, target, *tensors)


def common(mode: SplitMode, tensors: Sequence[torch.Tensor]) -> Shard | None:
    """How the result of an elementwise function of `tensors` is divided: as the largest of them that is."""
    shapes = [mode.shape(t) for t in tensors]
    num_dims = max(map(len, shapes))
    best: tuple[int, Shard] | None = None
    for tensor, shape in zip(tensors, shapes, strict=True):
        shard = mode.shard(tensor)
        if shard is not None and (best is None or tensor.numel() > best[0]):
            best = tensor.numel(), shard.at(shard.dim + num_dims - len(shape))
    return None if best is None else best[1]


def fit(mode: SplitMode, tensor: torch.Tensor, target: Shard, num_dims: int) -> torch.Tensor:
    """`tensor` as it is read where the result, of `num_dims` dimensions, is divided as `target`."""
    shape = mode.shape(tensor)
    dim = target.dim - (num_dims - len(shape))
    if dim < 0 or shape[dim] == 1:
        return mode.share(mode.whole(tensor))
    return mode.cut(tensor, target.at(dim))


@rule_for(
    "dropout",
    "dropout1d",
    "dropout2d",
    "dropout3d",
    "feature_dropout",
    "bernoulli",
    "rand_like",
    "randn_like",
)
def dropout(mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    with mode.random():
        result = func(*args, **kwargs)
    return mode.made(result, mode.shard(args[0]), args[0])


@rule_for("softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "sort", "argsort", "flip", "roll",
          "normalize", "glu", "gumbel_softmax", "renorm", "cummax", "cummin", "tril", "triu")  # fmt: skip
def along_a_dimension(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Needs the whole of one dimension; the others may be divided."""
    x = args[0]
    shard, shape = mode.shard(x), mode.shape(x)
    dims = _dims_of(func, args, kwargs, len(shape))
    if shard is None or shard.dim in dims or func.__name__ == "renorm":
        return func(*map_arguments(args, mode.whole), **map_arguments(kwargs, mode.whole))
    return mode.made(func(*args, **kwargs), shard, x)


def _dims_of(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], num_dims: int
) -> list[int]:
    name = func.__name__
    if name in ("tril", "triu", "tril_", "triu_"):
        return [num_dims - 2, num_dims - 1]
    key = "dims" if name in ("flip", "roll") else "dim"
    place = {"roll": 2, "normalize": 2, "gumbel_softmax": 4}.get(name, 1)
    default: Any = {"normalize": 1, "roll": None}.get(name, -1)
    given = kwargs.get(key, args[place] if len(args) > place else default)
    if given is None or isinstance(given, bool):
        return list(range(num_dims))
    if name == "flip" and len(args) > 2:
        given = args[1:]
    given = [given] if isinstance(given, int) else list(given)
    return [positive(int(d), num_dims) for d in given]
