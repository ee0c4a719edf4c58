"""How the members of a process group find out, through its store, whether they can share memory."""

from __future__ import annotations

import datetime
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch._C._distributed_c10d import Store

from paceline.comm import mailbox
from paceline.comm.mailbox import Mailbox
from paceline.comm.memory_map import join_memory
from paceline.comm.shared_memory import SharedMemory, memory_bytes
from paceline.errors import LaunchError
from paceline.measure.machine import usable_cores


def meet(
    store: Store, ranks: tuple[int, ...], rank: int, num_workers: int, timeout: datetime.timedelta
) -> tuple[SharedMemory, Mailbox] | str:
    """Share memory among the members of a group. A collective call of all of them.

    Takes 2 MiB of memory a member, and three to five messages of each member through the store.

    Args:
        store: the group's own.
        ranks: the members' ranks in the world.
        rank: this worker's place in the group.
        num_workers: how many workers compute on this host, in the group or not.

    Returns:
        The memory; or the reason, the same on all members, why they cannot share any.

    Raises:
        LaunchError: a member did not come in time.
    """
    tell_all = _through(store, rank, len(ranks), timeout)
    hosts = tell_all({"host": _host(), "cores": list(usable_cores())}, "hosts")
    size = len(ranks)
    local_size = sum(told["host"] == hosts[rank]["host"] for told in hosts)
    num_cores = len({core for told in hosts for core in told["cores"]})
    spins = max(size, num_workers) <= num_cores
    timeout_s = timeout.total_seconds()
    slots, reason = join_memory(rank, size, local_size, (0,), memory_bytes(size), tell_all)
    if slots is None:
        return reason
    head_bytes, most_bytes = mailbox.head_bytes(size), mailbox.OUTBOX_BYTES
    outboxes, reason = join_memory(rank, size, local_size, range(size), head_bytes, tell_all, most_bytes)
    if outboxes is None:
        slots.close()
        return reason
    memory = SharedMemory(slots, ranks, timeout_s, spins=spins)
    return memory, Mailbox(outboxes, ranks, timeout_s, spins=spins, recorder=memory.phases.recorder)


def _through(
    store: Store, rank: int, size: int, timeout: datetime.timedelta
) -> Callable[[Any, str], list[Any]]:
    """A function that gives every member's value (anything that JSON can say), in the order of rank."""
    num_calls = 0

    def tell_all(value: Any, what: str) -> list[Any]:
        nonlocal num_calls
        num_calls += 1
        keys = [f"paceline/{num_calls}/{other}" for other in range(size)]
        store.set(keys[rank], json.dumps(value))
        try:
            store.wait(keys, timeout)
        except RuntimeError as error:
            raise LaunchError(
                f"the {size} members of a process group did not all come within {timeout.total_seconds():.0f} s "
                f"to exchange {what}",
                cause="a worker died, or not all called init_process_group or new_group",
                next_step="look for the first worker that failed; the group's store must live until all have joined",
            ) from error
        return [json.loads(store.get(key)) for key in keys]

    return tell_all


def _host() -> list[str]:
    """Equal on two workers if each can see the other's process by the same number."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    return [boot.read_text(), os.readlink("/proc/self/ns/pid")] if boot.exists() else [os.uname().nodename]
