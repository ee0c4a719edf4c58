"""Switching off, for the length of a proof, what makes two runs of the same arithmetic differ."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

_PROBABILITY: dict[Callable[..., Any], str] = {
    F.dropout: "p",
    F.dropout1d: "p",
    F.dropout2d: "p",
    F.dropout3d: "p",
    F.alpha_dropout: "p",
    F.feature_alpha_dropout: "p",
    F.multi_head_attention_forward: "dropout_p",
}
"""Functions that drop at random, and the name of the argument that says how often."""
_POSITION: dict[Callable[..., Any], tuple[int, str]] = {
    torch.dropout: (1, "p"),
    torch.feature_dropout: (1, "p"),
    torch.alpha_dropout: (1, "p"),
    torch.feature_alpha_dropout: (1, "p"),
    F.scaled_dot_product_attention: (4, "dropout_p"),
}
"""The same for functions in native code, which have no signature: place and name."""


class NoDropout(TorchFunctionMode):
    """Within it, dropout drops nothing, whoever calls it; `switched_off` names what would have dropped."""

    def __init__(self) -> None:
        super().__init__()
        self.switched_off: set[str] = set()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        named = dict(kwargs or {})
        if func in _PROBABILITY:
            bound = inspect.signature(func).bind(*args, **named)
            bound.apply_defaults()
            if bound.arguments[_PROBABILITY[func]] and bound.arguments.get("training", True):
                bound.arguments[_PROBABILITY[func]] = 0.0
                self.switched_off.add(func.__name__)
            return func(*bound.args, **bound.kwargs)
        if func in _POSITION:
            place, name = _POSITION[func]
            given = args[place] if len(args) > place else named.get(name, 0.0)
            if given and _is_training(func, args, named):
                self.switched_off.add(func.__name__)
                if len(args) > place:
                    args = (*args[:place], 0.0, *args[place + 1 :])
                else:
                    named[name] = 0.0
        return func(*args, **named)


def _is_training(func: Callable[..., Any], args: tuple[Any, ...], named: Mapping[str, Any]) -> bool:
    """Native dropouts take `train` as their third argument; attention drops whenever it is told to."""
    if func is F.scaled_dot_product_attention:
        return True
    return bool(args[2] if len(args) > 2 else named.get("train", True))


@contextlib.contextmanager
def deterministic(*models: nn.Module) -> Iterator[NoDropout]:
    """Dropout off, in recurrent layers too, and no TF32: what is left is arithmetic.

    Yields:
        The mode, whose `switched_off` says what was.
    """
    mode = NoDropout()
    recurrent = [m for model in models for m in model.modules() if isinstance(m, nn.RNNBase) and m.dropout]
    probabilities = [module.dropout for module in recurrent]
    allowed = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    for module in recurrent:
        module.dropout = 0.0
        mode.switched_off.add(f"dropout of {type(module).__name__}")
    try:
        with mode:
            yield mode
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = allowed
        for module, probability in zip(recurrent, probabilities, strict=True):
            module.dropout = probability


@contextlib.contextmanager
def default_type(dtype: torch.dtype) -> Iterator[None]:
    """Within it, numbers without a type of their own are of `dtype`."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
