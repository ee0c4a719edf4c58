"""Workers that form a process group of torch.distributed's backend `shm`, in processes of their own."""

from __future__ import annotations

import datetime
import multiprocessing.connection
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional  # imported later, its functions' defaults would keep the group alive
from preloaded import CONTEXT

import paceline.comm.process_group as shm
from paceline.errors import CollectiveError

LIMIT_S = 60.0
TIMEOUT_S = 10.0


def run_shm(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    timeout_s: float = TIMEOUT_S,
    backend: str = "shm",
    lost: Collection[int] = (),
) -> list[Any]:
    """`function(rank, size, *arguments)` in `size` processes.

    Args:
        lost: ranks that do not come back, and are not waited for.

    Returns:
        What each rank returned, in the order of rank; None for those that are lost; the `CollectiveError` of a
        rank that raised one.
    """
    with tempfile.TemporaryDirectory() as folder:
        processes, ends = [], {}
        for rank in range(size):
            ours, theirs = CONTEXT.Pipe(duplex=False)
            target = (function, rank, size, folder, backend, timeout_s, theirs, arguments)
            process = CONTEXT.Process(target=_work, args=target)
            process.start()
            theirs.close()
            processes.append(process)
            ends[ours] = rank
        try:
            return _collect({end: rank for end, rank in ends.items() if rank not in lost}, size)
        finally:
            for process in processes:
                process.kill()
                process.join()


def _collect(waited_for: dict[Any, int], size: int) -> list[Any]:
    results: list[Any] = [None] * size
    deadline_s = time.monotonic() + LIMIT_S
    while waited_for:
        ready = multiprocessing.connection.wait(list(waited_for), deadline_s - time.monotonic())
        assert ready, f"ranks {sorted(waited_for.values())} hang"
        for end in ready:
            rank = waited_for.pop(end)
            kind, results[rank] = end.recv()
            assert kind == "returned", f"rank {rank}: {results[rank]}"
    return results


def join_group(rank: int, size: int, folder: str, backend: str = "shm", timeout_s: float = TIMEOUT_S) -> None:
    """Make the default process group, whose members meet in `folder`."""
    torch.set_num_threads(1)
    # Of gloo, which some calls go to.
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    shm.register_shm()
    dist.init_process_group(
        backend,
        init_method=f"file://{Path(folder) / 'store'}",
        rank=rank,
        world_size=size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def _work(function, rank, size, folder, backend, timeout_s, end, arguments) -> None:
    try:
        join_group(rank, size, folder, backend, timeout_s)
        end.send(("returned", function(rank, size, *arguments)))
    except CollectiveError as error:
        end.send(("returned", (type(error).__name__, str(error))))
    except BaseException:
        end.send(("raised", traceback.format_exc()))
    # Others may be dead: leaving in good order is tested by the functions that do it.
    time.sleep(LIMIT_S)
