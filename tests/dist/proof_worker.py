"""Proves dp_replicate=2 of a job of `jobs.py`, after an error was planted in paceline itself."""

from __future__ import annotations

import torch
from jobs import JOBS

from paceline.comm.gradients import GradientSync
from paceline.comm.mesh import make_mesh
from paceline.comm.world import World
from paceline.records import Layout
from paceline.split import batchnorm
from paceline.split.shared_parameters import SharedParameters
from paceline.train import held_model
from paceline.train.proof import prove
from paceline.train.session import Datasets

finish = GradientSync.finish
shared_finish = SharedParameters.finish


def forget_the_reduction() -> None:
    GradientSync._start = lambda self, bucket: None


def scale_wrongly() -> None:
    def wrong(self, sums, scale_by_sum):
        result = finish(self, sums, scale_by_sum)
        for parameter in self._parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        return result

    GradientSync.finish = wrong


def forget_one_parameter() -> None:
    """Its gradient stays this worker's own."""

    def wrong(self, sums, scale_by_sum):
        own = self._parameters[1].grad.clone()
        result = finish(self, sums, scale_by_sum)
        self._parameters[1].grad = own
        return result

    GradientSync.finish = wrong


def normalise_locally() -> None:
    batchnorm._forward = lambda module, local_forward, share, x: local_forward(x)


def clip_before_the_sum() -> None:
    def wrong(self, sums, scale_by_sum):
        torch.nn.utils.clip_grad_norm_(self._parameters, 0.01)
        return finish(self, sums, scale_by_sum)

    GradientSync.finish = wrong


def start_apart() -> None:
    """Rank 1 does not get rank 0's parameters, and begins with others."""
    if not hasattr(held_model, "broadcast"):
        raise RuntimeError("the error cannot be planted: held_model.broadcast is gone")
    held_model.broadcast = lambda model, group, **_: [p.data.mul_(1 + group.rank) for p in model.parameters()]


def round_roughly() -> None:
    """What float32 does where ReLU and max-pooling decide by the last digit: gone in float64."""

    def wrong(self, sums, scale_by_sum):
        result = finish(self, sums, scale_by_sum)
        for parameter in self._parameters:
            if parameter.grad is not None and parameter.grad.dtype == torch.float32:
                parameter.grad.mul_(1.001)
        return result

    GradientSync.finish = wrong


def skip_the_sum() -> None:
    """Each worker updates its share with its own gradients."""
    SharedParameters._add_up = lambda self, flat, share: None


def keep_a_share_back() -> None:
    """Rank 1 does not update its share."""

    def wrong(self, sums, scale_by_sum):
        result = shared_finish(self, sums, scale_by_sum)
        for piece in self.pieces.values() if self._group.rank == 1 else ():
            piece.grad = None
        return result

    SharedParameters.finish = wrong


def update_too_early() -> None:
    """Nobody waits for the others' gradients: the first worker reads what is not there yet."""
    SharedParameters._take = lambda self, member, parameter: None


def nothing() -> None:
    return


def prove_with(world: World, error: str, name: str) -> str:
    """The proof as JSON, or why there is none."""
    globals()[error]()
    job, micro = JOBS[name]
    layout = Layout(dp_replicate=2, micro=micro)
    mesh = make_mesh(world, layout)
    assert mesh is not None
    try:
        return prove(job, mesh, Datasets(job, 7), seed=7, device=world.device).model_dump_json()
    except Exception as caught:
        return str(caught)
