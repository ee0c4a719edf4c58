"""Tensor parallelism of any module: its own forward runs, and each call to torch is made on pieces.

Within the mode a divided tensor looks whole: shapes are those of the whole tensor, and a shape that the
model asks for is translated to that of the piece. Which calls can be made on pieces, and what must be exchanged for
them, is known for each function of torch (`split/rules`); any other function gets its tensors whole, so that a model
is computed right whatever it calls, if not always cheaply. Nothing is known of any model.

A tensor carries its division as an attribute, from the call that made it to those that read it. Cost: 8 µs of Python
for each call that reads a divided tensor, 4 µs for others (docs/log.md); none in the backward pass.
"""

from __future__ import annotations

import contextlib
import functools
import threading
import types
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from paceline.split.placement import Shape, Shard, evenly, is_divisible
from paceline.split.trees import map_arguments, map_tensors

_SHARD = "_paceline_shard"

Rule = Callable[["SplitMode", Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Callable[..., Any], Rule] = {}
"""What to do for a function of torch where one of its arguments is divided. Filled by `split/rules`."""

WEIGHTED: dict[Callable[..., Any], Rule] = {}
"""The same for functions that read a weight: called whether or not anything is divided."""


def shard_of(tensor: Any) -> Shard | None:
    """How `tensor` is divided; None: it is whole."""
    return getattr(tensor, _SHARD, None)


def mark(tensor: torch.Tensor, shard: Shard | None) -> torch.Tensor:
    """Say how `tensor`, a piece, is divided."""
    setattr(tensor, _SHARD, shard)
    return tensor


class SplitMode(TorchFunctionMode):
    """What rules may ask for: done on pieces (`TensorParallel`), or thought through on whole tensors (`Thought`)."""

    def __init__(self, num_workers: int, *, by_position: bool = False) -> None:
        """
        Args:
            by_position: what workers add up is divided along positions, not whole on all of them (sequence
                parallelism, Korthikanti et al. 2022): norms, dropout and sums of residual streams are computed, and
                kept for the backward pass, for 1/n of the positions by each worker.
        """
        super().__init__()
        self.num_workers, self.by_position = num_workers, by_position
        self._suspended = False

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs) if kwargs else {}
        if self._suspended:
            return func(*args, **named)
        rule = WEIGHTED.get(func)
        if rule is None:
            divided = any(map(_is_divided, args)) or any(map(_is_divided, named.values()))
            if not divided and not _holds_weights(func, args, named):
                return func(*args, **named)
            rule = RULES.get(func, on_whole_tensors)
        return rule(self, func, args, named)

    def __enter__(self) -> Any:
        _modes.active.append(self)
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        _modes.active.pop()

    def run_whole(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Call a function on whole tensors, and see nothing of what it calls."""
        with plainly():
            args, kwargs = map_tensors((args, kwargs), self.whole)
        self._suspended = True
        try:
            return function(*args, **kwargs)
        finally:
            self._suspended = False

    # What a rule reads.

    def shard(self, tensor: Any) -> Shard | None:
        return shard_of(tensor)

    def shape(self, tensor: torch.Tensor) -> Shape:
        """The whole tensor's shape."""
        raise NotImplementedError

    def local(self, shape: Sequence[int], shard: Shard | None) -> Shape:
        """What to ask torch for, so that the result is the piece of a tensor of `shape`."""
        raise NotImplementedError

    def divide(self, number: int) -> int:
        """A count, such as that of a convolution's groups, as this worker sees it."""
        raise NotImplementedError

    # What a rule does.

    def whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make it whole on every worker."""
        raise NotImplementedError

    def cut(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Divide it so, whatever it is now."""
        raise NotImplementedError

    def share(self, tensor: torch.Tensor) -> torch.Tensor:
        """A whole tensor, to be read by a divided computation."""
        raise NotImplementedError

    def add_up(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum of the workers' results."""
        raise NotImplementedError

    def share_together(self, tensors: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
        """`share`, of all of them."""
        return [self.share(tensor) for tensor in tensors]

    def share_whole(self, tensor: torch.Tensor) -> torch.Tensor:
        """Make it whole, to be read by a divided computation."""
        raise NotImplementedError

    def add_up_pieces(self, tensor: torch.Tensor, shard: Shard) -> torch.Tensor:
        """Each worker's piece of the sum of the workers' results."""
        raise NotImplementedError

    def add_up_product(self, tensor: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """The sum of what the workers have computed of a layer's outputs, [..., positions, features], and a bias."""
        shard = self._along_positions(tensor)
        if shard is None:
            result = self.add_up(tensor)
            return result if bias is None else result + self.whole(bias)
        result = self.add_up_pieces(tensor, shard)
        if bias is not None:
            result = result + self.share(self.whole(bias))
        return self.made(result, shard, tensor)  # type: ignore[no-any-return]

    def _along_positions(self, tensor: torch.Tensor) -> Shard | None:
        if not self.by_position or tensor.dim() < 3:
            return None
        shard = evenly(tensor.dim() - 2, tensor.shape[-2])
        return shard if is_divisible(shard, self.num_workers) else None

    def put(self, tensor: torch.Tensor, source: torch.Tensor) -> None:
        """Write the whole tensor `source` into the piece `tensor`, for a function that works in place."""
        raise NotImplementedError

    def made(self, result: Any, shard: Shard | None, *sources: Any) -> Any:
        """Say how the result of a call on `sources` is divided."""
        raise NotImplementedError

    def random(self) -> contextlib.AbstractContextManager[None]:
        """Within it, each worker draws other random numbers."""
        raise NotImplementedError

    def would_fit(self, tensor: torch.Tensor, shard: Shard) -> None:
        """The call could have been made on pieces if `tensor` were divided so."""

    def weigh(self, weight: torch.Tensor, shard: Shard, *, saves_only_memory: bool = False) -> None:
        """The call could be made on pieces if the weight were divided so."""

    def is_weight(self, tensor: torch.Tensor) -> bool:
        """Whether it is a parameter, or a transposed one."""
        return isinstance(tensor, torch.nn.Parameter)

    def own_range(self, shard: Shard) -> tuple[int, int]:
        """Where this worker's piece of a dimension in one part begins and ends."""
        raise NotImplementedError

    def cross_entropy_of_rows(self, scores: torch.Tensor, target: torch.Tensor, shard: Shard) -> torch.Tensor:
        """−log softmax(scores)[target], for scores [..., C] divided along C; shape that of `target`."""
        raise NotImplementedError

    def compose(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a function that is written in terms of torch's, each call of which is seen."""
        with self:
            return function(*args, **kwargs)


class _Modes(threading.local):
    def __init__(self) -> None:
        self.active: list[SplitMode] = []


_modes = _Modes()


def run_whole(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    """`SplitMode.run_whole` of the mode that is active in this thread, if one is."""
    if not _modes.active:
        return function(*args, **kwargs)
    return _modes.active[-1].run_whole(function, args, kwargs)


def _is_divided(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return shard_of(value) is not None
    if isinstance(value, tuple | list):
        return any(_is_divided(v) for v in value)
    return False


def _holds_weights(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """A whole layer as one function, such as multi-head attention: what it calls must be seen."""
    if not _is_composed(func) or func in RULES:
        return False
    return any(isinstance(a, torch.nn.Parameter) for a in (*args, *kwargs.values()))


def on_whole_tensors(
    mode: SplitMode, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """What to do with a function that has no rule."""
    if _reads_only(func):
        return func(*args, **kwargs)
    if _is_composed(func):
        return mode.compose(_without_overrides(func), *args, **kwargs)
    changed = [args[0]] if args and works_in_place(func) else []
    changed += [v for k, v in kwargs.items() if k == "out"]
    swapped = {id(t): mode.whole(t) for t in changed if shard_of(t) is not None}

    def make_whole(tensor: torch.Tensor) -> torch.Tensor:
        return swapped.get(id(tensor)) if id(tensor) in swapped else mode.whole(tensor)  # type: ignore[return-value]

    if swapped:
        swapped = {key: tensor.clone() for key, tensor in swapped.items()}
    result = func(*map_arguments(args, make_whole), **map_arguments(kwargs, make_whole))
    for tensor in changed:
        if id(tensor) in swapped:
            mode.put(tensor, swapped[id(tensor)])
            if result is swapped[id(tensor)]:
                result = tensor
    return result


def _is_composed(func: Callable[..., Any]) -> bool:
    """Whether it is written in Python, in terms of functions of torch that may have rules."""
    return isinstance(func, types.FunctionType) and func.__module__ in (
        "torch.nn.functional",
        "torch.functional",
    )


def plainly() -> contextlib.AbstractContextManager[Any]:
    """Within it, calls to torch are what they are, whatever modes are active: for our own bookkeeping."""
    return torch._C.DisableTorchFunction()


def works_in_place(func: Callable[..., Any]) -> bool:
    """Whether a function of torch writes its result into its first argument."""
    name = getattr(func, "__name__", "")
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


_IN_PLACE = {f"__i{name}__" for name in ("add", "sub", "mul", "truediv", "pow", "and", "or", "xor")}
_METADATA = {
    "dtype", "device", "requires_grad", "is_cuda", "is_cpu", "is_meta", "is_leaf", "layout", "is_sparse", "is_nested",
    "is_quantized", "is_mkldnn", "is_mps", "is_xpu", "is_xla", "names", "grad_fn", "retains_grad", "itemsize",
    "is_floating_point", "is_complex", "element_size", "get_device", "requires_grad_", "is_contiguous",
    "is_inference", "is_tensor", "ndimension", "dim", "ndim", "is_signed", "register_hook", "is_shared", "is_pinned",
    "has_names", "is_sparse_csr", "is_vulkan", "is_ipu", "is_maia", "is_mtia", "_is_view", "__hash__",
}  # fmt: skip


def _reads_only(func: Callable[..., Any]) -> bool:
    """Whether it asks for a property that a piece shares with the whole."""
    return _name_of(func) in _METADATA


def reads_no_values(func: Callable[..., Any]) -> bool:
    """Whether it asks for a property of a tensor, such as its shape."""
    return _name_of(func) in _METADATA or _name_of(func) in _SHAPES


def _name_of(func: Callable[..., Any]) -> str:
    name: str = getattr(func, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(func, "__self__", None), "__name__", "")
    return name


_SHAPES = {
    "shape",
    "size",
    "numel",
    "nelement",
    "__len__",
    "stride",
    "storage_offset",
    "untyped_storage",
    "nbytes",
}


@functools.cache
def _without_overrides(func: types.FunctionType) -> types.FunctionType:
    """The same function, which does not ask whether a mode wants to stand in for it."""
    names = {name: _no for name in func.__globals__ if name.startswith("has_torch_function")}
    return types.FunctionType(
        func.__code__, {**func.__globals__, **names}, func.__name__, func.__defaults__, func.__closure__
    )


def _no(*_: object) -> bool:
    return False
