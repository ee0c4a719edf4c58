"""Trains the models of `sharding_models.py` sharded over a group of workers; rank 0 writes what came out."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import gc
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from sharding_models import MAX_WORKERS, NUM_MICRO, NUM_STEPS, Chain, build, loss_of, make_optimizer
from torch import nn

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.split.deferred import DeferredParameters
from paceline.split.sharding import KEEPS, ShardedParameters
from paceline.split.swap import swap_parameters

Result = dict[str, torch.Tensor]

KINDS = {"nothing": ("sgd", "adamw"), "within_step": ("adamw",), "always": ("sgd",)}
"""The optimizers to train with."""


@dataclasses.dataclass(frozen=True)
class Groups:
    """The axes of a layout `dp_replicate × dp_shard`."""

    shard: Group
    replicate: Group
    data: Group


def train(name: str, keep: str, kind: str, groups: Groups, dtype: torch.dtype = torch.float64) -> Result:
    """As `train_plainly`; and what was seen of memory, and an evaluation after the training."""
    model = build(name, dtype)
    optimizer = make_optimizer(kind, [p for p in model.parameters() if p.requires_grad])
    sharded = ShardedParameters(
        model,
        list(model.blocks),
        model.apart(),
        groups.shard,
        groups.data,
        DeferredParameters(),
        keep=keep,
    )
    swap_parameters(optimizer, sharded.replaced)
    result: Result = {}
    whole = WholeBlocks(model)
    for step in range(NUM_STEPS):
        with counting(groups.shard) as num_calls:
            sharded.begin_step()
            for number in range(groups.data.rank, NUM_MICRO * MAX_WORKERS, groups.data.size):
                loss_of(model, step, number).backward()
                whole.count()
            sharded.finish()
        result["calls"] = torch.tensor([num_calls["all_gather_"], num_calls["reduce_scatter_"]])
        for flat in sharded.shard_gradients():
            groups.replicate.sum_(flat, "gradients of shards")
        result["bytes.after_finish"] = torch.tensor(bytes_behind(model))
        sharded.scale_(2.0)
        sharded.scale_(0.5)
        for key, gradient in sharded.whole_gradients():
            if gradient is not None:
                result[f"gradient.{step}.{key}"] = gradient.clone()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        sharded.publish()
    result["blocks.whole_at_once"] = torch.tensor(whole.most)
    model.eval()
    sharded.begin_step()
    with torch.no_grad():
        result["evaluation"] = loss_of(model, NUM_STEPS, 0)
    sharded.end_evaluation()
    result["bytes.after_evaluation"] = torch.tensor(bytes_behind(model))
    return result | {f"parameter.{key}": tensor.clone() for key, tensor in sharded.whole_parameters()}


class WholeBlocks:
    """Counts blocks whose parameters are whole, from within forward and backward."""

    def __init__(self, model: Chain) -> None:
        self._blocks = [list(block.parameters()) for block in model.blocks]
        self.most = 0
        for module in model.blocks.modules():
            if isinstance(module, nn.Linear):
                module.register_forward_hook(self._during)

    def count(self) -> None:
        whole = [all(p.untyped_storage().nbytes() for p in block) for block in self._blocks]
        self.most = max(self.most, sum(whole))

    def _during(self, module: nn.Module, args: Any, output: torch.Tensor) -> None:
        self.count()
        if output.requires_grad:
            output.register_hook(lambda _: self.count())


def bytes_behind(model: nn.Module) -> int:
    """Memory of the model's parameters."""
    return sum({s._cdata: s.nbytes() for s in (p.untyped_storage() for p in model.parameters())}.values())


def persistent_bytes(name: str, keep: str, group: Group) -> int:
    """Memory of all tensors that sharding leaves between backward pass and update: shards and their gradients."""
    gc.freeze()  # What is there already is not looked at.
    model = build(name)
    sharded = ShardedParameters(model, list(model.blocks), (), group, group, DeferredParameters(), keep=keep)
    sharded.begin_step()
    loss_of(model, 0, group.rank).backward()
    sharded.finish()
    group._wired._scratch.clear()  # What gloo received into is kept for the next message, one of a size.
    # gloo's thread lets go of a message a moment after it has said that it is done.
    return min(bytes_alive(wait_s) for wait_s in (0.0, 0.02, 0.2))


def bytes_alive(wait_s: float) -> int:
    """Memory of all tensors that there are after a while."""
    time.sleep(wait_s)
    gc.collect()
    tensors = [o for o in gc.get_objects() if issubclass(type(o), torch.Tensor)]
    return sum({s._cdata: s.nbytes() for s in (t.untyped_storage() for t in tensors)}.values())


@contextlib.contextmanager
def counting(group: Group) -> Iterator[collections.Counter[str]]:
    """How often each collective is called within it."""
    num_calls: collections.Counter[str] = collections.Counter()

    def counted(name: str) -> Callable[..., torch.Tensor]:
        function = getattr(group, name)

        def call(*args: Any) -> torch.Tensor:
            num_calls[name] += 1
            return function(*args)

        return call

    with contextlib.ExitStack() as patches:
        for name in ("all_gather_", "reduce_scatter_"):
            patches.enter_context(mock.patch.object(group, name, counted(name)))
        yield num_calls


@contextlib.contextmanager
def forgetting_one_reduction(group: Group) -> Iterator[None]:
    """Plant an error: the third reduction within it does nothing."""
    reduce_scatter, calls = group.reduce_scatter_, itertools.count(1)

    def forgetful(full: torch.Tensor, what: str) -> torch.Tensor:
        return full if next(calls) == 3 else reduce_scatter(full, what)

    with mock.patch.object(group, "reduce_scatter_", forgetful):
        yield


def two_by_two(world: World) -> Groups:
    mesh = make_mesh(world, Layout(dp_replicate=2, dp_shard=2))
    assert mesh is not None
    return Groups(mesh.shard, mesh.replicate, mesh.data)


def train_all(world: World, models: tuple[str, ...], out: Path) -> None:
    everyone = world.group(world.size)
    assert everyone is not None
    alone = Group.alone(world.device)
    groups = Groups(everyone, alone, everyone)
    results: dict[str, Result] = {}
    for name in models:
        for keep in KEEPS:
            for kind in KINDS[keep]:
                results[f"{name}/{keep}/{kind}"] = train(name, keep, kind, groups)
    over_gloo = dataclasses.replace(world, transport="gloo", groups={}).group(world.size)
    assert over_gloo is not None
    for keep in KEEPS:
        results[f"float32/{keep}"] = train("chain", keep, "sgd", groups, torch.float32)
        results[f"gloo/{keep}"] = train("experts", keep, "sgd", Groups(over_gloo, alone, over_gloo))
        if world.size == MAX_WORKERS:
            results[f"hybrid/{keep}"] = train("experts", keep, "sgd", two_by_two(world))
        with forgetting_one_reduction(everyone):
            results[f"planted/{keep}"] = train("chain", keep, "sgd", groups)
    for name in ("chain", "frozen"):
        results[f"bytes/{name}"] = {k: torch.tensor(persistent_bytes(name, k, everyone)) for k in KEEPS}
    if world.rank == 0:
        torch.save(results, out)
