"""What a small copy of an optimizer tells about how its work can be shared out."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from paceline.split.fused import prefer_fused
from paceline.split.granularity import NUMBERS, TENSORS, TOGETHER, granularity


def parameters() -> list[nn.Parameter]:
    shapes = [(64, 32), (32,), (8, 3, 3, 3), (1,), ()]
    return [nn.Parameter(torch.randn(shape)) for shape in shapes]


class NormedStep(torch.optim.Optimizer):
    """Moves each tensor by a step of fixed length."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.counted = 0

    def step(self, closure=None):
        self.counted += 1
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad / p.grad.norm().clamp_min(1e-9), alpha=-group["lr"])


class ClippedStep(NormedStep):
    """Moves all tensors together by a step of fixed length."""

    def step(self, closure=None):
        for group in self.param_groups:
            given = [p for p in group["params"] if p.grad is not None]
            norm = torch.stack([p.grad.norm() for p in given]).norm()
            for p in given:
                p.add_(p.grad / norm, alpha=-group["lr"])


ELEMENTWISE = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-3),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=1e-3, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=1e-3, foreach=True),
    "adam tensor lr": lambda p: torch.optim.Adam(p, lr=torch.tensor(1e-3)),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.1, centered=True),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.1),
    "groups": lambda p: torch.optim.AdamW(
        [{"params": p[:2]}, {"params": p[2:], "weight_decay": 0.1}], lr=0.1
    ),
    "lr zero": lambda p: torch.optim.SGD(p, lr=0.0),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_elementwise_optimizers_are_shared_out_by_numbers(name):
    assert granularity(ELEMENTWISE[name](parameters())) == NUMBERS


@pytest.mark.parametrize(
    "make",
    [NormedStep, lambda p: torch.optim.Adafactor(p, lr=0.1), lambda p: torch.optim.Muon([p[0]], lr=0.1)],
    ids=["normed", "adafactor", "muon"],
)
def test_optimizers_that_look_at_a_tensor_keep_tensors_whole(make):
    assert granularity(make(parameters())) == TENSORS


@pytest.mark.parametrize("make", [ClippedStep, torch.optim.LBFGS], ids=["clipped", "lbfgs"])
def test_optimizers_that_look_at_everything_are_not_shared_out(make):
    assert granularity(make(parameters())) == TOGETHER


def test_trying_out_changes_nothing():
    own = parameters()
    before = [p.detach().clone() for p in own]
    optimizer = NormedStep(own)
    torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0)
    optimizer.register_step_post_hook(lambda *_: pytest.fail("a hook of the real one was called"))
    drawn = torch.get_rng_state()
    assert granularity(optimizer) == TENSORS
    assert torch.equal(torch.get_rng_state(), drawn)
    assert all(torch.equal(p, was) for p, was in zip(own, before, strict=True))
    assert optimizer.counted == 0
    assert optimizer.param_groups[0]["params"] == own
    assert not optimizer.state


def test_a_step_that_knows_parameters_by_other_ways_cannot_reach_them():
    own = parameters()
    before = [p.detach().clone() for p in own]

    class Drifting(torch.optim.SGD):
        def step(self, closure=None):
            super().step(closure)
            with torch.no_grad():
                own[0] += 1.0

    assert granularity(Drifting(own, lr=0.1)) == TOGETHER
    assert all(torch.equal(p, was) for p, was in zip(own, before, strict=True))


@pytest.mark.parametrize(
    ("make", "expected"),
    [
        (lambda p: torch.optim.AdamW(p, lr=0.1), True),
        (lambda p: torch.optim.Adam(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), True),
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1), True),
        # It raises where a parameter gets its first gradient later than others (torch 2.13), and zeros are no way out.
        (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, dampening=0.5), False),
        # It makes its state when it is built, and for the way that it was built for.
        (lambda p: torch.optim.Adagrad(p, lr=0.1), False),
    ],
)
def test_one_pass_is_taken_where_the_user_left_it_open(make, expected):
    optimizer = make(parameters())
    taken = prefer_fused(optimizer)
    assert taken == expected
    assert all(group["fused"] is (True if taken else None) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    "asked_for", [{"fused": False}, {"foreach": True}, {"foreach": True, "fused": False}]
)
def test_what_the_user_asked_for_stays(asked_for):
    optimizer = torch.optim.AdamW(parameters(), lr=0.1, **asked_for)
    before = [dict(group) for group in optimizer.param_groups]
    assert not prefer_fused(optimizer)
    assert [dict(group) for group in optimizer.param_groups] == before


def test_one_pass_that_computes_something_else_is_not_taken():
    class Different(NormedStep):
        def __init__(self, params):
            super().__init__(params)
            self.param_groups[0]["fused"] = None

        def step(self, closure=None):
            for p in self.param_groups[0]["params"]:
                if p.grad is not None:
                    p.add_(p.grad, alpha=-0.2 if self.param_groups[0]["fused"] else -0.1)

    optimizer = Different(parameters())
    assert not prefer_fused(optimizer)
    assert optimizer.param_groups[0]["fused"] is None


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.1),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(
            [{"params": p[:1], "momentum": 0.0}, {"params": p[1:]}], lr=0.1, momentum=0.9
        ),
    ],
)
@pytest.mark.parametrize("late", [None, 0, 1])
def test_the_real_parameters_move_as_they_would(make, late):
    torch.manual_seed(0)
    plain = parameters()
    fused = [nn.Parameter(p.detach().clone()) for p in plain]
    optimizers = [make(p) for p in (plain, fused)]
    assert prefer_fused(optimizers[1])
    for step in range(4):
        for number, (a, b) in enumerate(zip(plain, fused, strict=True)):
            gradient = None if number == late and step < 2 else torch.randn_like(a)
            a.grad, b.grad = gradient, None if gradient is None else gradient.clone()
        for optimizer in optimizers:
            optimizer.step()
    for a, b in zip(plain, fused, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_the_users_own_fused_sgd_is_shared_out_as_any_and_begins_momenta_late():
    own = parameters()
    optimizer = torch.optim.SGD(own, lr=0.1, momentum=0.9, fused=True)
    assert not prefer_fused(optimizer)  # nothing was open
    assert granularity(optimizer) == NUMBERS
    for some in (own[:1], own):
        for p in some:
            p.grad = torch.ones_like(p)
        optimizer.step()
    assert all("momentum_buffer" in optimizer.state[p] for p in own)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_sparse_gradient_is_left_to_the_steps_that_take_it(momentum):
    """One pass is tried out on gradients that are not sparse; torch's refuses others."""

    def train(fused):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Linear(4, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=momentum)
        if fused:
            assert prefer_fused(optimizer)
        for _ in range(3):
            model(torch.tensor([1, 2, 1])).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        return [p.detach() for p in model.parameters()]

    for ours, plain in zip(train(True), train(False), strict=True):
        torch.testing.assert_close(ours, plain)
