"""Proves layouts after an error was planted in paceline itself, one after the other."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from split_jobs import SPLIT_JOBS
from torch.nn import functional as F

from paceline.comm.group import Group
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.errors import SplitError
from paceline.records import Layout
from paceline.split import block_proof, exchange, sharding, tensor_mode, tensor_plan
from paceline.train.pipeline import Pipeline
from paceline.train.proof import prove
from paceline.train.reduction import Reduction
from paceline.train.session import Datasets


@contextlib.contextmanager
def planted(place: Any, name: str, wrong: Any) -> Iterator[None]:
    right = getattr(place, name)
    setattr(place, name, wrong)
    try:
        yield
    finally:
        setattr(place, name, right)


def forget_a_reduction() -> contextlib.AbstractContextManager[None]:
    """Gradients of what all workers of a tensor-parallel group read stay each worker's own."""
    return planted(exchange._Share, "backward", staticmethod(lambda ctx, gradient: (gradient, None)))


@contextlib.contextmanager
def forget_a_reduction_unseen() -> Iterator[None]:
    """The same, and no piece of the model is proven by itself."""
    with forget_a_reduction(), planted(block_proof, "_differ", lambda *_, **__: ""):
        yield


@contextlib.contextmanager
def know_one_function_wrongly() -> Iterator[None]:
    """SiLU, which the blocks use and the rest does not, takes the mean of what each worker has for that of all."""
    right = tensor_mode.RULES[F.silu]

    def wrong(mode: Any, func: Any, args: Any, kwargs: Any) -> Any:
        (x,) = args
        return mode.made(func(x) * (2.0 - func(x).detach().sign()), mode.shard(x), x)

    tensor_mode.RULES[F.silu] = wrong
    try:
        yield
    finally:
        tensor_mode.RULES[F.silu] = right


def fail_every_piece() -> contextlib.AbstractContextManager[None]:
    def wrong(whole: Any, parts: Any, shards: Any, *_: Any, **__: Any) -> str:
        return "relative error 1.0e+00 in output 0" if shards else ""

    return planted(block_proof, "_differ", wrong)


def scale_wrongly() -> contextlib.AbstractContextManager[None]:
    right = Group.reduce_scatter_

    def wrong(self: Group, full: Any, what: str) -> None:
        right(self, full, what)
        full.mul_(0.5)

    return planted(Group, "reduce_scatter_", wrong)


def swap_heads() -> contextlib.AbstractContextManager[None]:
    """Each of two workers has the other's heads of queries, keys and values, and its own rows of what reads them."""
    right = tensor_plan.take

    def wrong(whole: Any, shard: Any, rank: int, num_workers: int) -> Any:
        return right(whole, shard, 1 - rank if len(shard.parts) == 3 else rank, num_workers)

    return planted(tensor_plan, "take", wrong)


def keep_a_stale_tied_weight() -> contextlib.AbstractContextManager[None]:
    return planted(Reduction, "_add_up_tied", lambda self: None)


def lose_a_shard() -> contextlib.AbstractContextManager[None]:
    """The updated parameters of the other workers are not heard of."""
    return planted(sharding._Flat, "publish", lambda self: None)


def mix_up_micro_batches() -> contextlib.AbstractContextManager[None]:
    right = Pipeline.step

    def wrong(self: Pipeline, batch: Any, *rest: Any) -> None:
        if not self.has_last:
            batch.parts.reverse()
        right(self, batch, *rest)

    return planted(Pipeline, "step", wrong)


def nothing() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def prove_all(world: World, asked: list[tuple[str, str, str]]) -> dict[str, str]:
    """The proof, or why there is none, by error, job and layout."""
    proofs = {}
    for error, name, text in asked:
        job, _ = SPLIT_JOBS[name]
        mesh = make_mesh(world, Layout.parse(text))
        assert mesh is not None
        with globals()[error]():
            try:
                proved = prove(job, mesh, Datasets(job, 7), seed=7, device=world.device).model_dump_json()
            except SplitError as refused:
                proved = str(refused)
        proofs[f"{error}/{name}/{text}"] = proved
    return proofs
