"""Several workers on one GPU, which NCCL refuses: what they tell each other goes through the host's memory and gloo.

Everything else is as on a GPU each: tensors, streams and events, the paths of the code that are taken for CUDA.
"""

from __future__ import annotations

import datetime
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore

from paceline.comm import wire, wire_collectives, world


class _Arriving:
    """An operation of gloo on copies in the host's memory; `wait` brings home what came."""

    def __init__(self, work: Any, bring_home: Callable[[], object] | None = None) -> None:
        self._work, self._bring_home = work, bring_home

    def wait(self) -> None:
        self._work.wait()
        if self._bring_home is not None:
            self._bring_home()


def _all_reduce(tensor: torch.Tensor, *, group: Any, async_op: bool) -> _Arriving:
    copy = tensor.cpu()
    return _Arriving(dist.all_reduce(copy, group=group, async_op=True), lambda: tensor.copy_(copy))


def _broadcast(tensor: torch.Tensor, *, group: Any, group_src: int, async_op: bool) -> _Arriving:
    copy = tensor.cpu()
    work = dist.broadcast(copy, group=group, group_src=group_src, async_op=True)
    return _Arriving(work, lambda: tensor.copy_(copy))


def _all_gather(into: torch.Tensor, own: torch.Tensor, *, group: Any, async_op: bool) -> _Arriving:
    copy = torch.empty_like(into, device="cpu")
    rows = list(copy.view(dist.get_world_size(group), -1))
    work = dist.all_gather(rows, own.cpu(), group=group, async_op=True)
    return _Arriving(work, lambda: into.copy_(copy))


def _reduce_scatter(own: torch.Tensor, full: torch.Tensor, *, group: Any, async_op: bool) -> _Arriving:
    copy = full.cpu()
    work = dist.all_reduce(copy, group=group, async_op=True)
    row = dist.get_rank(group)
    return _Arriving(work, lambda: own.copy_(copy.view(-1, own.numel())[row].view_as(own)))


def _all_to_all_single(
    received: torch.Tensor, sent: torch.Tensor, *, group: Any, async_op: bool
) -> _Arriving:
    copy = torch.empty_like(received, device="cpu")
    work = dist.all_to_all_single(copy, sent.cpu(), group=group, async_op=True)
    return _Arriving(work, lambda: received.copy_(copy))


class Link:
    """Stands for NCCL's group of two: what one sends the other receives, one after the other."""

    def __init__(self, name: str, rank: int, timeout_s: float) -> None:
        store = PrefixStore(f"through_host/{name}", dist.distributed_c10d._get_default_store())
        timeout = datetime.timedelta(seconds=timeout_s)
        self._gloo: Any = dist.ProcessGroupGloo(store, rank, 2, timeout=timeout)

    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> _Arriving:
        copies = [tensor.cpu() for tensor in tensors]
        return _Arriving(self._gloo.send(copies, to, tag), lambda: copies.clear())

    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> _Arriving:
        (tensor,) = tensors
        copy = torch.empty_like(tensor, device="cpu")
        return _Arriving(self._gloo.recv([copy], source, tag), lambda: tensor.copy_(copy))

    def shutdown(self) -> None:
        self._gloo.shutdown()


def _init_process_group(backend: str, **how: Any) -> None:
    dist.init_process_group("gloo", **how)


def go_through_host() -> None:
    """From now on, in this process: every worker's GPU is the first, and NCCL is replaced."""
    calls = {
        "all_reduce": _all_reduce, "broadcast": _broadcast, "all_to_all_single": _all_to_all_single,
    }  # fmt: skip
    wire_collectives.dist = types.SimpleNamespace(**calls)
    wire.nccl_link = Link
    wire_collectives._all_gather, wire_collectives._reduce_scatter = _all_gather, _reduce_scatter
    kept = {
        name: getattr(dist, name)
        for name in ("new_group", "group", "is_initialized", "destroy_process_group")
    }
    world.dist = types.SimpleNamespace(**kept, init_process_group=_init_process_group)
