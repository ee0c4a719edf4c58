"""The threads with which gloo carries messages."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

_LOOP = "gloo_tcp_loop"
_TASKS = Path("/proc/self/task")


def let_gloo_wait_its_turn() -> None:
    """Let no thread of gloo's take the processor from the thread that has just called gloo. For new groups anew.

    What comes over a socket wakes gloo's loop, which takes the processor at once if it can, and then runs for one to
    three milliseconds while its caller waits for the processor: measured with one core for a worker, and nearly every
    message. Probably the caller holds the lock of that connection, as it does while it sends, and the loop, which looks
    without sleeping (pytorch/gloo#246), looks for it until its time slice is over (docs/decisions/0022). A batch thread
    waits until the processor is free, as it is as soon as this one waits for the message, or until the next tick.
    """
    if not hasattr(os, "SCHED_BATCH"):
        return
    with contextlib.suppress(OSError):
        for task in _TASKS.iterdir():
            # A thread may end at any time.
            with contextlib.suppress(OSError):
                number = int(task.name)
                if (task / "comm").read_text().strip() != _LOOP:
                    continue
                if os.sched_getscheduler(number) == os.SCHED_OTHER:
                    os.sched_setscheduler(number, os.SCHED_BATCH, os.sched_param(0))
