"""Workers that join each other and do something together, in processes of their own."""

from __future__ import annotations

import multiprocessing.connection
import os
import time
from collections.abc import Callable
from typing import Any

import torch
from preloaded import CONTEXT

from paceline.comm.world import AUTO, World, join, listen_on_loopback
from paceline.errors import CollectiveError

LIMIT_S = 60.0
TIMEOUT_S = 10.0


def run_group(
    function: Callable[..., Any],
    size: int,
    *arguments: Any,
    transport: str = AUTO,
    timeout_s: float = TIMEOUT_S,
    lost: int | None = None,
    per_host: int | None = None,
    limit_s: float = LIMIT_S,
) -> dict[int, Any]:
    """`function(world, *arguments)` in `size` processes.

    Args:
        lost: a rank that does not come back, and is not waited for.
        per_host: how many workers the launcher says are on each host; None: all.
        limit_s: how long all of it may take.

    Returns:
        What each rank returned; of a `CollectiveError` its operation, whether it timed out, and its cause.
    """
    with listen_on_loopback(0) as listener:
        port = listener.getsockname()[1]
    processes, ends = [], {}
    for rank in range(size):
        ours, theirs = CONTEXT.Pipe(duplex=False)
        process = CONTEXT.Process(
            target=_work,
            args=(function, rank, size, per_host or size, port, transport, timeout_s, theirs, arguments, limit_s),
        )
        process.start()
        theirs.close()
        processes.append(process)
        ends[ours] = rank
    results: dict[int, Any] = {}
    deadline_s = time.monotonic() + limit_s
    try:
        waited_for = {end: rank for end, rank in ends.items() if rank != lost}
        while waited_for:
            ready = multiprocessing.connection.wait(list(waited_for), deadline_s - time.monotonic())
            assert ready, f"ranks {sorted(waited_for.values())} hang"
            for end in ready:
                rank = waited_for.pop(end)
                results[rank] = end.recv()
        return results
    finally:
        for process in processes:
            process.kill()
            process.join()


def _work(function, rank, size, per_host, port, transport, timeout_s, end, arguments, limit_s) -> None:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(size))
    os.environ.update(LOCAL_RANK=str(rank % per_host), LOCAL_WORLD_SIZE=str(per_host))
    world: World = join("cpu", timeout_s, port, transport)
    try:
        end.send(function(world, *arguments))
    except CollectiveError as error:
        end.send((error.operation, error.timed_out, error.cause))
    # Others may be dead: leaving in good order is not what is tested.
    time.sleep(limit_s)
