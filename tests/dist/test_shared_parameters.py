"""One copy of the parameters on a host, each worker updating its share of it."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch
from groups import run_group
from jobs import Points, cross_entropy, data_of
from split_jobs import SPLIT_JOBS
from torch import nn

import paceline
from paceline.comm.mesh import build_mesh, make_mesh
from paceline.comm.world import World
from paceline.errors import WorkerError
from paceline.records import Layout
from paceline.train.session import Session

pytestmark = pytest.mark.shared_memory

STEPS = 4


class Coupled(torch.optim.SGD):
    """One step length for all parameters together."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        gradients = [p.grad for g in self.param_groups for p in g["params"] if p.grad is not None]
        torch._foreach_div_(gradients, torch.stack(torch._foreach_norm(gradients)).norm())
        super().step(closure)


def deep() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 160), nn.Tanh(), nn.Linear(160, 160), nn.Tanh(), nn.Linear(160, 4))


def in_groups(parameters: Any) -> torch.optim.Optimizer:
    decayed = [p for p in parameters if p.dim() > 1]
    others = [p for p in parameters if p.dim() == 1]
    return torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.1}, {"params": others, "lr": 1e-2}], lr=3e-3
    )


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "groups": in_groups,
    "fused": lambda p: torch.optim.AdamW(p, lr=3e-3, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2, initial_accumulator_value=0.1),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-2),
    "coupled": lambda p: Coupled(p, lr=1e-2),
}


def job_with(name: str) -> paceline.Job:
    return paceline.Job(
        model=deep,
        data=data_of(Points),
        loss=cross_entropy,
        optimizer=OPTIMIZERS[name],
        schedule=lambda optimizer, steps: torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda s: min(1.0, s / 2)
        ),
        clip_norm=0.5,
        batch_size=24,
        steps=STEPS,
    )


def train(world: World, name: str, layout: str) -> dict[str, Any]:
    """What came out: parameters, the bytes of the optimizer's state, whether the parameters are shared."""
    parsed = Layout.parse(layout)
    mesh = make_mesh(world, parsed)
    session = Session(job_with(name), parsed, seed=3, world=world, mesh=mesh)
    losses = [session.step(batch).loss for batch in session.batches()]
    state = [v for s in session.optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    result = {n: p.detach().clone() for n, p in session.model.named_parameters()}
    first = next(session.model.parameters())
    session.group.barrier("before the test's own write")
    if world.rank == 0:
        with torch.no_grad():
            first.fill_(7.0)
    session.group.barrier("after it")
    return {
        "has_own_storage": all(p.untyped_storage().nbytes() == p.nbytes for p in session.model.parameters()),
        "losses": losses,
        "parameters": result,
        "state_numel": sum(v.numel() for v in state),
        "is_shared": bool((first == 7.0).all()),
        "why_not": session.why_not_shared,
    }


@pytest.fixture(scope="module", params=OPTIMIZERS)
def trained(request: pytest.FixtureRequest) -> tuple[str, dict[str, Any], dict[int, Any]]:
    name = request.param
    alone = run_group(train, 1, name, "dp_replicate=1")[0]
    return name, alone, run_group(train, 3, name, "dp_replicate=3")


def test_the_update_is_that_of_one_process(trained):
    _, alone, together = trained
    for result in together.values():
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for key, wanted in alone["parameters"].items():
            torch.testing.assert_close(result["parameters"][key], wanted, rtol=1e-4, atol=1e-6)


def test_parameters_are_the_same_memory(trained):
    name, _, together = trained
    for rank, result in together.items():
        assert result["is_shared"] == (name != "coupled" or rank == 0)
        assert result["has_own_storage"], "saving a parameter would save others with it"
        assert bool(result["why_not"]) == (name == "coupled")


def test_each_worker_has_its_share_of_the_optimizers_state(trained):
    name, alone, together = trained
    found = sum(result["state_numel"] for result in together.values())
    if name == "coupled":
        return  # SGD without momentum has none
    # Counts of steps are kept once for each piece.
    assert found == pytest.approx(alone["state_numel"], abs=40)
    largest = max(result["state_numel"] for result in together.values())
    # The largest tensor is nine tenths of the model: who wants tensors whole has them so.
    assert largest < alone["state_numel"] * (0.4 if name != "adafactor" else 1.0)


@pytest.mark.parametrize(
    ("name", "hosts"), [("groups", 2), ("fused", 3), ("adafactor", 2)], ids=lambda value: str(value)
)
def test_each_of_several_hosts_has_one_copy(name, hosts):
    alone = run_group(train, 1, name, "dp_replicate=1")[0]
    together = run_group(train, 2 * hosts, name, f"dp_replicate={2 * hosts}", per_host=2, timeout_s=30.0)
    for rank, result in together.items():
        assert not result["why_not"]
        assert result["is_shared"] == (rank < 2), "the write on the first host is seen there and only there"
        assert result["losses"] == pytest.approx(alone["losses"], rel=1e-5)
        for key, wanted in alone["parameters"].items():
            assert torch.equal(result["parameters"][key], together[0]["parameters"][key])
            torch.testing.assert_close(result["parameters"][key], wanted, rtol=1e-4, atol=1e-6)
    found = sum(result["state_numel"] for result in together.values())
    assert found == pytest.approx(hosts * alone["state_numel"], abs=40 * hosts)


def evaluate_apart(world: World) -> str:
    """One host's copy is changed behind the training's back."""
    layout = Layout(dp_replicate=world.size)
    session = Session(job_with("fused"), layout, seed=3, world=world, mesh=make_mesh(world, layout))
    if world.rank == 2:
        with torch.no_grad():
            next(session.model.parameters()).add_(1.0)
    try:
        session.evaluate()
    except WorkerError as error:
        return str(error)
    return ""


def test_hosts_whose_copies_have_parted_are_told():
    for text in run_group(evaluate_apart, 4, per_host=2).values():
        assert "the parameters of rank 2 differ from rank 0's, first in 0.weight" in text


def train_split(world: World, layout: str) -> dict[str, Any]:
    parsed = Layout.parse(layout)
    mesh = build_mesh(world, parsed)
    job, _ = SPLIT_JOBS["transformer"]
    session = Session(job, parsed, seed=3, world=world, mesh=mesh)
    batches = session.batches(steps=3)
    result = {"losses": [session.step(batch).loss for batch in batches]}
    result["state"] = {n: t.clone() for n, t in session.whole_state() if t is not None}
    return result


@pytest.mark.parametrize(
    ("layout", "per_host"),
    [
        ("dp_replicate=2,tp=2", None),
        ("pp=2,dp_replicate=2,micro=2", None),
        ("dp_replicate=4,recompute=full", 2),
        ("dp_replicate=4,tp=2", 4),
        ("pp=2,dp_replicate=4,micro=2", 2),
        ("dp_replicate=2,recompute=full", None),
    ],
)
def test_it_combines_with_layouts_that_split_the_model(layout, per_host):
    size = Layout.parse(layout).workers
    shared = run_group(train_split, size, layout, timeout_s=30.0, per_host=per_host)
    by_messages = run_group(train_split, size, layout, transport="gloo", timeout_s=30.0)
    assert shared[0]["losses"] == pytest.approx(by_messages[0]["losses"], rel=1e-5)
    for key, wanted in by_messages[0]["state"].items():
        torch.testing.assert_close(shared[0]["state"][key], wanted, rtol=1e-3, atol=1e-5)


def die_before_the_update(world: World, doomed: int) -> None:
    session = Session(
        job_with("fused"),
        Layout(dp_replicate=world.size),
        seed=3,
        world=world,
        mesh=make_mesh(world, Layout(dp_replicate=world.size)),
    )
    if world.rank == doomed:
        session.optimizer.register_step_pre_hook(lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    for batch in session.batches():
        session.step(batch)


@pytest.mark.parametrize("doomed", [0, 1])
def test_a_death_within_the_update_is_told_by_the_survivor(doomed):
    results = run_group(die_before_the_update, 2, doomed, lost=doomed)
    operation, timed_out, cause = results[1 - doomed]
    assert "updated parameters" in operation
    assert not timed_out
    assert cause == f"rank {doomed} has ended"


def without_room(world: World) -> tuple[str, float]:
    group = world.group(world.size)
    assert group is not None

    def full(makers: Any, data_bytes: int) -> Any:
        raise OSError(0, "rank 1 cannot reserve shared memory: No space left on device")

    group.map_memory = full  # type: ignore[method-assign]
    layout = Layout(dp_replicate=world.size)
    session = Session(job_with("fused"), layout, seed=3, world=world, mesh=make_mesh(world, layout))
    losses = [session.step(batch).loss for batch in session.batches()]
    return session.why_not_shared, losses[-1]


def test_without_room_each_worker_keeps_its_own_and_it_is_said():
    alone = run_group(train, 1, "fused", "dp_replicate=1")[0]
    for why, loss in run_group(without_room, 2).values():
        assert "No space left on device" in why
        assert loss == pytest.approx(alone["losses"][-1], rel=1e-5)
