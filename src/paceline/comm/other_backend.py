"""Groups of gloo and NCCL beside a group in shared memory, for what memory cannot carry."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import PrefixStore, Store, Work

_OLD_NAMES = {"all_gather_single": "_allgather_base", "reduce_scatter_single": "_reduce_scatter_base"}
"""torch 2.13 renamed them."""


class OtherBackends:
    """Makes each when it is first needed: by a call that all members make, so that all make it then."""

    def __init__(self, store: Store, rank: int, size: int, timeout: datetime.timedelta) -> None:
        self._store, self._rank, self._size, self._timeout = store, rank, size, timeout
        self._made: dict[str, Any] = {}

    def run(self, operation: str, tensor: torch.Tensor, *arguments: Any) -> Work:
        """Carry out a call on gloo or NCCL, whichever is for the device of `tensor`."""
        name = "nccl" if tensor.device.type == "cuda" else "gloo"
        if name not in self._made:
            told = f"{operation} of a {tensor.layout} tensor of {tensor.dtype} on {tensor.device.type}"
            warnings.warn(
                f"{told}, and calls like it, go through {name} instead of shared memory", stacklevel=3
            )
            self._made[name] = self._make(name)
        backend = self._made[name]
        call = getattr(backend, operation, None) or getattr(backend, _OLD_NAMES[operation])
        work: Work = call(*(a for a in arguments if a is not None))
        return work

    def set_timeout(self, timeout: datetime.timedelta) -> None:
        """Of those that are made, and will be."""
        self._timeout = timeout
        for backend in self._made.values():
            backend._set_default_timeout(timeout)

    def call(self, operation: str) -> None:
        """`abort` or `shutdown` of those that were made."""
        for backend in self._made.values():
            getattr(backend, operation)()

    def _make(self, name: str) -> Any:
        store = PrefixStore(f"{name}/", self._store)
        if name == "gloo":
            return dist.ProcessGroupGloo(store, self._rank, self._size, timeout=self._timeout)
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = self._timeout
        return dist.ProcessGroupNCCL(store, self._rank, self._size, options)
