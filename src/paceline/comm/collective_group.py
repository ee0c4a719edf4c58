"""Collectives of a process group, as torch.distributed calls them, on shared memory."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store, Work

from paceline.comm.memory_map import DTYPES
from paceline.comm.other_backend import OtherBackends
from paceline.comm.reductions import AVG, BAND, BOR, BXOR, MAX, MIN, PRODUCT, SUM, Reduction, can_reduce
from paceline.comm.shared_memory import SLOT_BYTES, SharedMemory
from paceline.comm.staging import contiguous, staged
from paceline.comm.works import FinishedWork, finished
from paceline.errors import CollectiveError

_REDUCTIONS = {
    dist.ReduceOp.SUM: SUM,
    dist.ReduceOp.AVG: AVG,
    dist.ReduceOp.MIN: MIN,
    dist.ReduceOp.MAX: MAX,
    dist.ReduceOp.PRODUCT: PRODUCT,
    dist.ReduceOp.BAND: BAND,
    dist.ReduceOp.BOR: BOR,
    dist.ReduceOp.BXOR: BXOR,
}
_KNOWN = frozenset(DTYPES)
_STRIDED = torch.strided


# Its own methods are overloaded; torch.distributed calls them with lists and options only.
class CollectiveGroup(dist.ProcessGroup):
    """The collectives of `SharedMemoryGroup`. Lists and options are what torch.distributed hands to a backend.

    Each is done when it returns, and raises `CollectiveError`. Some have two names: torch 2.13 renamed them.
    """

    def __init__(
        self, store: Store, rank: int, size: int, timeout: datetime.timedelta, memory: SharedMemory
    ) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        self.memory = memory
        self._rank, self._size = rank, size
        self._others = OtherBackends(store, rank, size, timeout)
        self._what = "a tensor"

    def broadcast(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:  # type: ignore[override]
        (tensor,) = tensors
        if not is_served(tensor):
            return self._others.run("broadcast", tensor, tensors, opts)
        with staged(tensors) as (whole,):
            self.memory.broadcast_(whole, self._what, opts.rootRank)
        return FinishedWork(tensors)

    def allreduce(self, tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        opts = opts or dist.AllreduceOptions()
        (tensor,) = tensors
        reduction = _reduction(opts, tensor)
        if reduction is None:
            return self._others.run("allreduce", tensor, tensors, opts)
        if tensor.is_contiguous():
            self.memory.all_reduce_(tensor, self._what, reduction)
        else:
            with staged(tensors) as (whole,):
                self.memory.all_reduce_(whole, self._what, reduction)
        return finished(opts, tensors)

    def allreduce_coalesced(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:
        opts = opts or dist.AllreduceCoalescedOptions()
        num_bytes = sum(t.numel() * t.element_size() for t in tensors)
        reduction = _reduction(opts, *tensors)
        if (
            len(tensors) > 1
            and reduction
            and num_bytes <= SLOT_BYTES
            and len({t.dtype for t in tensors}) == 1
        ):
            flat = torch.cat([t.detach().reshape(-1) for t in tensors])
            self.memory.all_reduce_(flat, self._what, reduction)
            for tensor, part in zip(tensors, flat.split([t.numel() for t in tensors]), strict=True):
                tensor.detach().copy_(part.view(tensor.shape))
        else:
            for tensor in tensors:
                self.allreduce([tensor], opts).wait()
        return FinishedWork(tensors)

    def reduce(self, tensors: list[torch.Tensor], opts: Any = None) -> Work:  # type: ignore[override]
        (tensor,) = tensors
        reduction = _reduction(opts, tensor)
        if reduction is None:
            return self._others.run("reduce", tensor, tensors, opts)
        with staged(tensors) as (whole,):
            self.memory.reduce_(whole, self._what, reduction, opts.rootRank)
        return FinishedWork(tensors)

    def allgather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:
        (outs,), (own,) = output_tensors, input_tensors
        if not is_served(own):
            return self._others.run("allgather", own, output_tensors, input_tensors, opts)
        self._check_sizes("all-gather", outs, own)
        with staged(outs) as whole:
            self.memory.all_gather(whole, contiguous(own), self._what)
        return FinishedWork(outs)

    def all_gather_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        if not is_served(input):
            return self._others.run("all_gather_single", input, output, input, opts)
        self._check_single("all-gather", output, input)
        if output.is_contiguous():
            self.memory.all_gather_single(output, contiguous(input), self._what)
        else:
            with staged([output]) as (whole,):
                self.memory.all_gather_single(whole, contiguous(input), self._what)
        return finished(opts, [output])

    _allgather_base = all_gather_single

    def all_gather_single_coalesced(
        self, output_lists: list[torch.Tensor], input_list: list[torch.Tensor], opts: Any = None
    ) -> Work:
        for output, own in zip(output_lists, input_list, strict=True):
            self.all_gather_single(output, own, opts).wait()
        return FinishedWork(output_lists)

    allgather_into_tensor_coalesced = all_gather_single_coalesced

    def allgather_coalesced(
        self, output_lists: list[list[torch.Tensor]], input_list: list[torch.Tensor], opts: Any = None
    ) -> Work:
        for number, own in enumerate(input_list):
            self.allgather([[of_rank[number] for of_rank in output_lists]], [own], opts).wait()
        return FinishedWork(output_lists)

    def reduce_scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        opts = opts or dist.ReduceScatterOptions()
        (out,), (parts,) = output_tensors, input_tensors
        reduction = _reduction(opts, out)
        if reduction is None:
            return self._others.run("reduce_scatter", out, output_tensors, input_tensors, opts)
        self._check_sizes("reduce-scatter", parts, out)
        with staged([out]) as (whole,):
            self.memory.reduce_scatter(whole, [contiguous(p) for p in parts], self._what, reduction)
        return FinishedWork([out])

    def reduce_scatter_single(self, output: torch.Tensor, input: torch.Tensor, opts: Any = None) -> Work:
        opts = opts or dist.ReduceScatterOptions()
        reduction = _reduction(opts, output)
        if reduction is None:
            return self._others.run("reduce_scatter_single", output, output, input, opts)
        self._check_single("reduce-scatter", input, output)
        if output.is_contiguous():
            self.memory.reduce_scatter_single(output, contiguous(input), self._what, reduction)
        else:
            with staged([output]) as (whole,):
                self.memory.reduce_scatter_single(whole, contiguous(input), self._what, reduction)
        return finished(opts, [output])

    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]

    def reduce_scatter_single_coalesced(
        self, outputs: list[torch.Tensor], inputs: list[torch.Tensor], opts: Any = None
    ) -> Work:
        for output, full in zip(outputs, inputs, strict=True):
            self.reduce_scatter_single(output, full, opts).wait()
        return FinishedWork(outputs)

    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced  # type: ignore[assignment]

    def scatter(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        (out,) = output_tensors
        if not is_served(out):
            return self._others.run("scatter", out, output_tensors, input_tensors, opts)
        parts = input_tensors[0] if self._rank == opts.rootRank else []
        self._check_sizes("scatter", parts or [out] * self._size, out)
        with staged([out]) as (whole,):
            self.memory.scatter(whole, [contiguous(p) for p in parts], self._what, opts.rootRank)
        return FinishedWork([out])

    def gather(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:  # type: ignore[override]
        (own,) = input_tensors
        if not is_served(own):
            return self._others.run("gather", own, output_tensors, input_tensors, opts)
        outs = output_tensors[0] if self._rank == opts.rootRank else []
        self._check_sizes("gather", outs or [own] * self._size, own)
        with staged(outs) as whole:
            self.memory.gather(whole, contiguous(own), self._what, opts.rootRank)
        return FinishedWork(outs)

    def alltoall(self, output_tensors: Any, input_tensors: Any, opts: Any = None) -> Work:
        if not is_served(*input_tensors):
            return self._others.run("alltoall", input_tensors[0], output_tensors, input_tensors, opts)
        self._check_count("all-to-all", output_tensors)
        self._check_count("all-to-all", input_tensors)
        with staged(output_tensors) as whole:
            self.memory.all_to_all(whole, [contiguous(t) for t in input_tensors], self._what)
        return FinishedWork(output_tensors)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        output_split_sizes: Any,
        input_split_sizes: Any,
        opts: Any = None,
    ) -> Work:
        if not is_served(input):
            return self._others.run(
                "alltoall_base", input, output, input, output_split_sizes, input_split_sizes, opts
            )
        with staged([output]) as (whole,):
            outs = self._split(whole.detach(), output_split_sizes)
            parts = self._split(contiguous(input), input_split_sizes)
            self.memory.all_to_all(outs, parts, self._what)
        return FinishedWork([output])

    alltoall_base = all_to_all_single  # type: ignore[assignment]

    def barrier(self, opts: Any = None) -> Work:
        self.memory.barrier(self._what)
        return FinishedWork()

    def monitored_barrier(self, timeout: Any = None, wait_all_ranks: bool = False) -> None:
        """`barrier`: its error names who is missing in any case."""
        self.memory.barrier(self._what)

    def _split(self, tensor: torch.Tensor, sizes: Sequence[int]) -> list[torch.Tensor]:
        if not sizes and tensor.shape[0] % self._size:
            raise self.refusal(
                "all-to-all",
                f"a first dimension of {tensor.shape[0]} cannot be divided equally among {self._size}",
                next_step="give split sizes, or pad the tensor",
            )
        return list(tensor.split(list(sizes) or [tensor.shape[0] // self._size] * self._size))

    def _check_single(self, kind: str, whole: torch.Tensor, own: torch.Tensor) -> None:
        if whole.numel() != own.numel() * self._size or whole.dtype != own.dtype:
            raise self.refusal(
                kind,
                f"{whole.numel()} elements of {whole.dtype} are not {self._size} × {own.numel()} of {own.dtype}",
            )

    def _check_sizes(self, kind: str, rows: Sequence[torch.Tensor], own: torch.Tensor) -> None:
        self._check_count(kind, rows)
        for row in rows:
            if row.numel() != own.numel() or row.dtype != own.dtype:
                raise self.refusal(
                    kind,
                    f"a list has {row.numel()} × {row.dtype} where {own.numel()} × {own.dtype} are needed",
                )

    def _check_count(self, kind: str, rows: Sequence[torch.Tensor]) -> None:
        if len(rows) != self._size:
            raise self.refusal(
                kind, f"a list has {len(rows)} tensors for the {self._size} members of the group"
            )

    def refusal(
        self, kind: str, cause: str, next_step: str = "correct the call's arguments"
    ) -> CollectiveError:
        return self.memory.phases.error(cause, next_step=next_step, name=f"{kind} of {self._what}")


def is_served(*tensors: torch.Tensor) -> bool:
    for tensor in tensors:
        if not tensor.is_cpu or tensor.layout is not _STRIDED or tensor.dtype not in _KNOWN:
            return False
    return True


def _reduction(opts: Any, *tensors: torch.Tensor) -> Reduction | None:
    """The call's operation; None where shared memory cannot carry it out on these tensors."""
    reduction = _REDUCTIONS.get(opts.reduceOp.op)
    if reduction is None or not is_served(*tensors):
        return None
    for tensor in tensors:
        if not can_reduce(reduction, tensor.dtype):
            return None
    return reduction
