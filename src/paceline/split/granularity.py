"""What a small copy of an optimizer tells: how finely its work can be shared out.

Adam updates each number by itself; Muon or Adafactor look at a whole matrix; an optimizer that keeps one trust region
for everything looks at all of them. Nothing is known of any class: a small copy of the optimizer is tried out.
"""

from __future__ import annotations

import collections
import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from paceline.split.fused_sgd import prepare_fused_sgd
from paceline.split.swap import Cut, swap_parameters

NUMBERS, TENSORS, TOGETHER = "numbers", "tensors", "together"
"""From the finest to the coarsest."""

_LARGEST = 4
"""Sizes of a tried parameter, along each dimension, are at most this."""
_STEPS = 3
_TOLERANCE = 1e-5
_LEARNING_RATE = 0.01


def granularity(optimizer: Any) -> str:
    """`NUMBERS`, `TENSORS` or `TOGETHER`: the parts of which a worker may update some without the others.

    Copies of the optimizer, with all its settings, take three steps on small random parameters: one on whole
    ones, others on halves, others on some of them. What gives equal updates may be shared out so. An optimizer
    that cannot be tried out (it wants a closure, or the real parameters) is `TOGETHER`.

    Cost: a few small steps; no copy of the real parameters or of their state. torch's random numbers are not used up.
    """
    real = [p for group in optimizer.param_groups for p in group["params"]]
    with torch.random.fork_rng(devices=[]), torch.no_grad(), out_of_reach(real):
        # Any code may stand in a user's optimizer, and raise anything: on such parts it cannot work, then.
        try:
            trial = Trial(optimizer)
        except Exception:
            return TOGETHER
        for kind, ways in ((NUMBERS, _HALVES), (TENSORS, _EVERY_OTHER)):
            try:
                if trial.agrees(ways):
                    return kind
            except Exception:
                continue
    return TOGETHER


@contextlib.contextmanager
def out_of_reach(parameters: Sequence[nn.Parameter]) -> Iterator[None]:
    """Within it nobody can write to them: a step may know parameters by other ways than its groups."""
    kept = [p.data for p in parameters]
    for p in parameters:
        p.data = torch.zeros((), dtype=p.dtype, device=p.device).expand(p.shape)
    try:
        yield
    finally:
        for p, data in zip(parameters, kept, strict=True):
            p.data = data


Way = Callable[[int, torch.Tensor], Cut | None]
"""What one of two workers has of parameter `number`; None: nothing."""


def _half(which: int) -> Way:
    def way(number: int, parameter: torch.Tensor) -> Cut | None:
        middle = parameter.numel() // 2
        begin, end = (0, middle) if which == 0 else (middle, parameter.numel())
        return None if begin == end else lambda tensor: tensor.reshape(-1)[begin:end].clone()

    return way


def _every_other(which: int) -> Way:
    return lambda number, parameter: torch.clone if number % 2 == which else None


_HALVES = (_half(0), _half(1))
_EVERY_OTHER = (_every_other(0), _every_other(1))


class Trial:
    """What copies of an optimizer, with all its settings, make of small random parameters in a few steps.

    Raises:
        Exception: whatever the optimizer does on them; `RuntimeError` if it does not move them.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        real = [p for group in optimizer.param_groups for p in group["params"]]
        self._generator = torch.Generator().manual_seed(0)
        self._begin = [torch.randn(_small(p), generator=self._generator, dtype=p.dtype) for p in real]
        self._gradients = [
            [
                torch.randn(p.shape, generator=self._generator, dtype=p.dtype)
                if number % 3 != step + 1
                else None  # not used in this step, as an expert that no sample was sent to
                for number, p in enumerate(self._begin)
            ]
            for step in range(_STEPS)
        ]
        self._real = real
        self._whole = self._run(lambda number, parameter: torch.clone)
        moved = sum(float((new - old).abs().sum()) for new, old in zip(self._whole, self._begin, strict=True))
        if not moved > 0:
            raise RuntimeError("it does not move")

    def agrees_with(self, other: Trial) -> bool:
        """Whether the other makes the same of whole parameters."""
        return all(
            _is_close(new - old, wanted - old)
            for new, wanted, old in zip(self._whole, other._whole, self._begin, strict=True)
        )

    def agrees(self, ways: Sequence[Way]) -> bool:
        """Whether workers that have only parts make of each part what one with the whole makes of it."""
        for way in ways:
            found = self._run(way)
            for number, (new, whole, old) in enumerate(zip(found, self._whole, self._begin, strict=True)):
                cut = way(number, old)
                if cut is None:
                    continue
                if not _is_close(new - cut(old), cut(whole) - cut(old)):
                    return False
        return True

    def _run(self, way: Way) -> list[torch.Tensor]:
        """The parts, as `way` cuts them, after all steps."""
        stand_ins = [nn.Parameter(tensor.clone()) for tensor in self._begin]
        small = _copy(self._optimizer, dict(zip(self._real, stand_ins, strict=True)))
        cuts = [way(number, tensor) for number, tensor in enumerate(self._begin)]
        parts = [
            None if cut is None else nn.Parameter(cut(t)) for cut, t in zip(cuts, self._begin, strict=True)
        ]
        swap_parameters(
            small,
            {
                stand_in: None if part is None or cut is None else (part, cut)
                for stand_in, part, cut in zip(stand_ins, parts, cuts, strict=True)
            },
        )
        for gradients in self._gradients:
            for part, cut, gradient in zip(parts, cuts, gradients, strict=True):
                if part is not None and cut is not None:
                    part.grad = None if gradient is None else cut(gradient)
            prepare_fused_sgd(small)
            small.step()
        return [torch.empty(0) if part is None else part.detach() for part in parts]


def _is_close(update: torch.Tensor, wanted: torch.Tensor) -> bool:
    return float((update - wanted).norm()) <= _TOLERANCE * float(wanted.norm()) + 1e-12


def _small(parameter: torch.Tensor) -> tuple[int, ...]:
    return tuple(min(size, _LARGEST) for size in parameter.shape)


def _copy(optimizer: Any, stand_ins: dict[nn.Parameter, nn.Parameter]) -> Any:
    """An optimizer of the same class and settings, on other, smaller parameters."""
    memo: dict[int, Any] = {id(real): stand_in for real, stand_in in stand_ins.items()}
    new = object.__new__(type(optimizer))
    for key, value in vars(optimizer).items():
        if key.endswith("_hooks"):
            new.__dict__[key] = type(value)()
        elif key not in ("state", "param_groups", "step"):  # schedulers put a `step` of their own there
            new.__dict__[key] = copy.deepcopy(value, memo)
    new.__dict__["param_groups"] = [
        {
            key: [stand_ins[p] for p in value] if key == "params" else copy.deepcopy(value, memo)
            for key, value in group.items()
        }
        for group in optimizer.param_groups
    ]
    for group in new.param_groups:
        if "lr" in group:  # a warm-up may begin at zero
            group["lr"] = (
                torch.full_like(group["lr"], _LEARNING_RATE) if _is_tensor(group["lr"]) else _LEARNING_RATE
            )
    state: Any = collections.defaultdict(dict)
    for real, values in optimizer.state.items():
        corner = tuple(slice(0, size) for size in _small(real))
        state[stand_ins[real]] = {
            key: value[corner].clone()
            if _is_tensor(value) and value.shape == real.shape
            else copy.deepcopy(value, memo)
            for key, value in values.items()
        }
    new.__dict__["state"] = state
    return new


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)
