"""One copy of the parameters on each of several hosts: gradients that travel while the backward pass goes on."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
from groups import run_group
from jobs import Points, cross_entropy, data_of
from test_shared_parameters import OPTIMIZERS
from torch import nn
from torch.utils.checkpoint import checkpoint

import paceline
from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.errors import CollectiveError, JobError
from paceline.records import Layout
from paceline.split.deferred import DeferredParameters
from paceline.split.early_sums import EarlySums
from paceline.split.granularity import NUMBERS
from paceline.split.shared_layout import Flat, _cut
from paceline.split.shared_parameters import SharedParameters
from paceline.train import noise
from paceline.train.session import Session

pytestmark = pytest.mark.shared_memory

_WIDTH, _STEPS, _MICRO = 600, 3, 2
"""A layer's weight is 1.4 MB, and a segment has 512 KiB for each of a host's workers."""
_OTHERS_USE = {1: lambda rank: rank == 0, 2: lambda rank: False}
"""Layers that not all ranks use."""


def _model() -> nn.ModuleList:
    """The last layer has the weight of another; a bias is frozen."""
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(_WIDTH, _WIDTH) for _ in range(7))
    layers[6].weight = layers[5].weight
    layers[4].bias.requires_grad_(False)
    return layers


def _loss(layers: nn.ModuleList, rank: int, micro: int, half_way: Any = None) -> torch.Tensor:
    x = torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(10 * rank + micro))
    for at, layer in enumerate(layers):
        if at in _OTHERS_USE and not _OTHERS_USE[at](rank):
            continue
        if at == 3 and half_way is not None:
            x.register_hook(half_way)
        x = torch.tanh(layer(x))
    return x.square().sum()


def _group(world: World) -> Group:
    group = world.group(world.size)
    assert group is not None
    assert group.transport == "shared memory + gloo"
    return group


def _share(layers: nn.Module, group: Group) -> SharedParameters:
    return SharedParameters(dict(layers.named_parameters()), group, DeferredParameters(), 1, kind=NUMBERS)


def _count_sent(group: Group) -> list[int]:
    """The bytes of each message that is begun from now on."""
    sent: list[int] = []
    start = group.start_sum_between_hosts

    def noted(own: torch.Tensor, what: str, number: int) -> None:
        sent.append(own.nbytes)
        start(own, what, number)

    group.start_sum_between_hosts = noted  # type: ignore[method-assign]
    return sent


def reduce(world: World, early: bool) -> dict[str, Any]:
    """Of each step the global gradients, and what was sent before the backward pass had ended; this worker's own."""
    group, layers, alone = _group(world), _model(), _model()
    shared = _share(layers, group)
    sent = _count_sent(group)
    found: dict[str, Any] = {"own": [], "global": [], "sent": [], "network": []}
    for step in range(_STEPS):
        alone.zero_grad(set_to_none=True)
        sent_before = group._memory.network_bytes
        for micro in range(_MICRO):
            last = early and micro == _MICRO - 1
            shared.begin_backward(last=last)
            # Nobody passes the middle before all of its host have come there: what follows finds theirs.
            half_way = (lambda gradient: group.barrier_on_host("a test")) if last else None
            _loss(layers, world.rank, 2 * step + micro, half_way).backward()
            _loss(alone, world.rank, 2 * step + micro).backward()
            if not last:
                assert not sent
        num_early = len(sent)
        sums = shared.finish(torch.tensor([2.0]), 0)
        assert float(sums) == 2.0 * world.size
        found["network"].append(group._memory.network_bytes - sent_before)
        found["global"].append({n: None if g is None else g.clone() for n, g in shared.whole_gradients()})
        found["own"].append(
            {n: None if p.grad is None else p.grad.clone() for n, p in alone.named_parameters()}
        )
        found["sent"].append((num_early, list(sent)))
        shared.publish()
        sent.clear()
    found["segments"] = [[m.name for m in s.members] for flat in shared._trained for s in flat.segments]
    return found


def _as_said(found: dict[int, Any], step: int, name: str, per_host: int) -> torch.Tensor | None:
    """Within each host in the order of rank, these sums in the order of hosts; divided by the sum of weights."""
    own = [found[rank]["own"][step][name] for rank in range(len(found))]
    if all(gradient is None for gradient in own):
        return None
    like = next(gradient for gradient in own if gradient is not None)
    own = [torch.zeros_like(like) if gradient is None else gradient for gradient in own]
    total: torch.Tensor | None = None
    for begin in range(0, len(own), per_host):
        of_host = own[begin].clone()
        for gradient in own[begin + 1 : begin + per_host]:
            of_host += gradient
        total = of_host if total is None else total + of_host
    assert total is not None
    return total * (1.0 / (2.0 * len(own)))


@pytest.mark.parametrize(("num_hosts", "per_host"), [(2, 2), (3, 2), (2, 3)])
def test_gradients_travel_during_the_last_backward_pass_and_are_the_same_bits(num_hosts, per_host):
    size = num_hosts * per_host
    found = run_group(reduce, size, True, per_host=per_host, timeout_s=40.0)
    at_the_end = run_group(reduce, size, False, per_host=per_host, timeout_s=40.0)
    used_late = {"0", "1", "2"}
    half_way = [
        names for names in found[0]["segments"] if not any(name.split(".")[0] in used_late for name in names)
    ]
    assert half_way
    for rank in range(size):
        assert found[rank]["segments"] == found[0]["segments"]
        for step in range(_STEPS):
            for name in found[rank]["global"][step]:
                got, wanted = found[rank]["global"][step][name], _as_said(found, step, name, per_host)
                assert (got is None) == (wanted is None) == (name in ("2.weight", "2.bias")), name
                if got is not None:
                    assert torch.equal(got, wanted), name
                    assert torch.equal(got, at_the_end[rank]["global"][step][name]), name
            num_early, sent = found[rank]["sent"][step]
            # The first step finds out which gradients come once.
            assert (num_early >= len(half_way)) if step > 0 else (num_early == 0)
            assert num_early < len(sent)
            assert at_the_end[rank]["sent"][step][0] == 0
            assert sorted(at_the_end[rank]["sent"][step][1]) == sorted(sent)
            assert max(sent) <= 1.5 * (512 << 10)
            # The docstring of `SharedParameters`; and the step's sums, which one worker of each host carries.
            said = sum(sent) * (1 if num_hosts == 2 else 2 * (num_hosts - 1) / num_hosts)
            assert said - 100 <= found[rank]["network"][step] <= said + 100 + 4096


class Twice(nn.Module):
    """A weight whose gradient comes in two pieces from `step` on: both calls are differentiated apart."""

    def __init__(self, at_step: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.tied = nn.Linear(_WIDTH, _WIDTH), nn.Linear(_WIDTH, _WIDTH)
        self.last = nn.Linear(_WIDTH, _WIDTH)
        self.at_step = at_step

    def forward(self, x: torch.Tensor, step: int) -> torch.Tensor:
        x = self.first(x)
        for _ in range(2):
            x = checkpoint(self.tied, x, use_reentrant=True) if step >= self.at_step else self.tied(x)
        return self.last(x)


def reduce_twice(world: World, at_step: int) -> Any:
    group, model, alone = _group(world), Twice(at_step), Twice(at_step)
    shared = _share(model, group)
    sent = _count_sent(group)
    wrong, early = [], []
    for step in range(_STEPS):
        x = torch.randn(3, _WIDTH, generator=torch.Generator().manual_seed(10 * world.rank + step))
        shared.begin_backward(last=True)
        try:
            model(x, step).sum().backward()
        except JobError as error:
            return str(error)
        early.append(len(sent))
        shared.finish(torch.tensor([1.0]), None)
        alone.zero_grad()
        alone(x, step).sum().backward()
        own = {n: p.grad for n, p in alone.named_parameters()}
        for name, gradient in shared.whole_gradients():
            rows = group.gather(own[name], "a test")
            if not torch.equal(gradient, (rows[0] + rows[1]) + (rows[2] + rows[3])):
                wrong.append((step, name))
        shared.publish()
        sent.clear()
    return wrong, early


def test_a_gradient_that_comes_in_pieces_is_held_back():
    for wrong, _ in run_group(reduce_twice, 4, 0, per_host=2, timeout_s=30.0).values():
        assert not wrong


def test_a_gradient_that_suddenly_comes_in_pieces_after_it_was_sent_is_an_error():
    told = run_group(reduce_twice, 4, 2, per_host=2, timeout_s=10.0)
    words = [text for text in told.values() if isinstance(text, str)]
    assert words
    assert all("the gradient of tied." in text and "came in several pieces" in text for text in words)


def deep() -> nn.Module:
    wide = [layer for _ in range(3) for layer in (nn.Linear(700, 700), nn.Tanh())]
    return nn.Sequential(nn.Linear(12, 700), nn.Tanh(), *wide, nn.Linear(700, 4))


def train(world: World, optimizer: str, early: bool) -> dict[str, Any]:
    """With clipping, micro-batches and measurements of the noise scale."""
    noise.SHARE = 1e9  # measured every second step
    if not early:
        EarlySums.begin_backward = lambda self, last: None  # type: ignore[method-assign]
    job = paceline.Job(
        model=deep,
        data=data_of(Points),
        loss=cross_entropy,
        optimizer=OPTIMIZERS[optimizer],
        clip_norm=0.5,
        batch_size=24,
        steps=5,
    )
    layout = Layout(dp_replicate=world.size, micro=2)
    session = Session(job, layout, seed=3, world=world, mesh=make_mesh(world, layout))
    sent = _count_sent(session.group)
    results, num_early = [], []
    session.optimizer.register_step_pre_hook(lambda *_: sent.clear())
    finish = SharedParameters.finish

    def counted(self: SharedParameters, *arguments: Any) -> torch.Tensor:
        num_early.append(len(sent))
        return finish(self, *arguments)

    SharedParameters.finish = counted  # type: ignore[method-assign]
    for batch in session.batches():
        result = session.step(batch)
        measured = None if result.noise is None else result.noise.measured.to_json()
        results.append((result.loss, result.grad_norm, measured))
    session.evaluate()
    return {
        "early": num_early,
        "results": results,
        "parameters": {n: p.detach().clone() for n, p in session.model.named_parameters()},
    }


@pytest.mark.parametrize("optimizer", ["groups", "adafactor"])
def test_a_training_comes_to_the_same_bits(optimizer):
    found = run_group(train, 4, optimizer, True, per_host=2, timeout_s=30.0)
    at_the_end = run_group(train, 4, optimizer, False, per_host=2, timeout_s=30.0)
    for rank in range(4):
        assert found[rank]["results"] == at_the_end[rank]["results"]
        assert any(measured for _, _, measured in found[rank]["results"])
        for name, wanted in at_the_end[rank]["parameters"].items():
            assert torch.equal(found[rank]["parameters"][name], wanted)
        assert found[rank]["early"][0] == 0
        assert not any(at_the_end[rank]["early"])
    for host in (0, 2):
        # Who of a host is the last to leave a segment sends it at once.
        assert all(
            sum(pair) > 0
            for pair in zip(*(found[host + place]["early"][1:] for place in (0, 1)), strict=True)
        )


def end_half_way(world: World, how: int) -> tuple[tuple[str, bool, str], float, int]:
    """Rank 1 ends, or falls silent, in the middle of a backward pass, when gradients are under way."""
    group, layers = _group(world), _model()
    shared = _share(layers, group)
    sent = _count_sent(group)
    for step in range(2):
        sent.clear()
        shared.begin_backward(last=True)

        def half_way(gradient: torch.Tensor, step: int = step) -> None:
            group.barrier_on_host("a test")
            if step == 1 and world.rank == 1:
                os.kill(os.getpid(), how)

        begin_s = time.monotonic()
        try:
            _loss(layers, world.rank, step, half_way).backward()
            shared.finish(torch.tensor([1.0]), None)
            shared.publish()
        except CollectiveError as error:
            return (error.operation, error.timed_out, error.cause), time.monotonic() - begin_s, len(sent)
    raise AssertionError("nobody has noticed")


def test_a_death_in_the_middle_of_a_backward_pass_is_told_by_all():
    results = run_group(end_half_way, 4, signal.SIGKILL, per_host=2, timeout_s=4.0, lost=1)
    assert set(results) == {0, 2, 3}
    (operation, timed_out, cause), waited_s, num_sent = results[0]
    assert num_sent > 0, "nothing was under way"
    assert "barrier of gradients" in operation
    assert (timed_out, cause) == (False, "rank 1 has ended")
    assert waited_s < 3.0
    (operation, timed_out, cause), _, _ = results[3]
    assert operation.startswith("all-reduce of gradients (")
    assert not timed_out
    assert cause.startswith("rank 1 is gone or its connection broke")
    # Its own neighbour, and rank 0, whose process this test lets live, break off: it waits in vain.
    (operation, timed_out, cause), waited_s, _ = results[2]
    assert "gradients" in operation
    assert waited_s < 20.0
    assert cause.startswith(("rank 0 did not answer within 4 s", "rank 3 "))


def test_a_worker_that_falls_silent_in_the_middle_of_a_backward_pass_is_named():
    results = run_group(end_half_way, 4, signal.SIGSTOP, per_host=2, timeout_s=2.0, lost=1)
    for rank, missing in ((0, 1), (2, 0), (3, 1)):
        (operation, timed_out, cause), waited_s, _ = results[rank]
        assert "gradients" in operation
        assert timed_out
        assert cause.startswith(f"rank {missing} did not answer within 2 s")
        assert 1.5 < waited_s < 15.0


def test_segments_follow_the_backward_pass_and_divide_what_they_hold():
    named = {
        f"p{at}": nn.Parameter(torch.zeros(numel)) for at, numel in enumerate((500, 40, 1, 300, 33, 100))
    }
    late = {named["p5"]}
    assert [list(part) for part in _cut(named, 1300, late)] == [["p4"], ["p3", "p2"], ["p1"], ["p0"], ["p5"]]
    for by_numbers in (True, False):
        flat = Flat(named, 2, by_numbers=by_numbers, segment_bytes=1300, late=late)
        at = 0
        for segment in flat.segments:
            assert segment.bounds[0] == at <= segment.bounds[1] <= segment.bounds[2]
            at = segment.bounds[2]
            for member in segment.members:
                pieces = [segment.overlap(member, place) for place in (0, 1)]
                held = [end - begin for begin, end in pieces if begin < end]
                assert sum(held) == member.parameter.numel()
                assert by_numbers or len(held) == 1
        assert at == flat.numel
        assert len(Flat(named, 2, by_numbers=by_numbers).segments) == 1
