"""What calls to torch return on absent tensors: the same from the second time on, when it is made from shapes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F

from paceline.errors import SplitError
from paceline.split import absent
from paceline.split.absent import AbsentCalls, AbsentPieces
from paceline.split.pieces import Piece
from paceline.split.trees import flatten


def absent_tensor(*shape, requires_grad=True, dtype=torch.float32):
    tensor = torch.empty(shape, dtype=dtype, device="meta")
    return tensor.requires_grad_().clone() if requires_grad else tensor


CALLS = {
    "sum of two": (torch.add, (absent_tensor(3, 4), torch.ones(4)), {}),
    "no gradient": (torch.add, (absent_tensor(3, 4, requires_grad=False), 1), {}),
    "a method": (torch.Tensor.mul, (2.5, absent_tensor(3))[::-1], {}),
    "turned over": (torch.Tensor.exp, (absent_tensor(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),), {}),
    "transposed": (torch.Tensor.exp, (absent_tensor(2, 3).t(),), {}),
    "several": (torch.max, (absent_tensor(3, 4), 1), {}),
    "parts": (torch.split, (absent_tensor(6, 4), 2), {}),
    "list": (torch.meshgrid, ([absent_tensor(3), absent_tensor(2)],), {"indexing": "ij"}),
    "view": (torch.Tensor.view, (absent_tensor(3, 4), 12), {}),
    "itself": (torch.Tensor.contiguous, (absent_tensor(3, 4),), {}),
    "whole numbers": (torch.Tensor.long, (absent_tensor(3),), {}),
    "slice": (torch.Tensor.__getitem__, (absent_tensor(6, 4), (slice(1, None, 2), ..., None)), {}),
    "by index": (torch.Tensor.__getitem__, (absent_tensor(6, 4), torch.tensor([1, 2])), {}),
    "loss": (F.cross_entropy, (absent_tensor(3, 4), torch.tensor([1, 0, 2])), {"label_smoothing": 0.1}),
    "dtype": (torch.Tensor.to, (absent_tensor(3), torch.bfloat16), {}),
    "device": (torch.Tensor.new_zeros, (absent_tensor(3), (2, 2)), {"device": torch.device("cpu")}),
}  # fmt: skip


def described(result):
    if isinstance(result, torch.Tensor):
        return (
            result.is_meta,
            result.shape,
            result.stride(),
            result.dtype,
            result.requires_grad,
            result.is_leaf,
        )
    return type(result), [described(one) for one in result]


@pytest.mark.parametrize("name", CALLS)
def test_a_call_gives_the_same_the_second_time(name):
    func, args, kwargs = CALLS[name]
    plain = AbsentCalls(torch.device("cpu")).result(func, args, kwargs)
    calls = AbsentCalls(torch.device("cpu"))
    results = [calls.result(func, args, kwargs) for _ in range(3)]
    assert [described(r) for r in results] == [described(plain)] * 3
    with torch.no_grad():
        without = [calls.result(func, args, kwargs) for _ in range(2)]
        assert [described(r) for r in without] == [described(func(*to_meta(args), **to_meta(kwargs)))] * 2


def to_meta(value):
    if isinstance(value, torch.Tensor):
        return value.to("meta")
    if isinstance(value, torch.device):
        return torch.device("meta")
    if isinstance(value, tuple | list):
        return type(value)(to_meta(v) for v in value)
    return {k: to_meta(v) for k, v in value.items()} if isinstance(value, dict) else value


def test_what_is_known_is_not_called_again(monkeypatch):
    called = []

    def function(x, power):
        called.append(power)
        return x**power

    calls = AbsentCalls(torch.device("cpu"))
    x = absent_tensor(3, 4)
    for power in (2, 2, 2.0, True, True, 2):
        assert calls.result(function, (x, power), {}).shape == (3, 4)
    assert called == [2, 2.0, True]
    assert calls.result(function, (absent_tensor(2), 2), {}).shape == (2,)
    assert len(called) == 4
    monkeypatch.setattr(absent, "_MOST_KNOWN", 6)
    for number in range(20):
        calls.result(function, (x, 10 + number), {})
    assert len(calls._known) <= 6


def test_writing_into_a_view_reaches_its_base():
    calls = AbsentCalls(torch.device("cpu"))
    for _ in range(2):
        base = absent_tensor(4, 4, requires_grad=False)
        row = calls.result(torch.Tensor.__getitem__, (base, 0), {})
        calls.result(torch.Tensor.copy_, (row, absent_tensor(4)), {})
        assert base.requires_grad


def test_a_call_that_needs_values_fails_each_time():
    calls = AbsentCalls(torch.device("cpu"))
    for _ in range(2):
        with pytest.raises(SplitError, match="on a value that another stage computes"):
            calls.result(torch.Tensor.item, (absent_tensor(1),), {})


class Masked(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4, device="meta")

    def forward(self, x, mask):
        return self.norm(x * mask)


def test_a_piece_that_is_absent_may_be_given_what_is_on_a_gpu():
    """As a mask that every stage makes for itself; nothing of it is computed."""
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        mask = torch.ones(3, 1, device=gpu)
    piece = Piece("masked", Masked())
    leaves, restore = flatten(((absent_tensor(3, 4, requires_grad=False), mask), {}))
    with torch.no_grad():  # which asks the device, where there is one
        found = AbsentPieces(gpu).outputs(piece, piece.module.forward, leaves, restore)
    assert (found.is_meta, found.shape) == (True, (3, 4))
