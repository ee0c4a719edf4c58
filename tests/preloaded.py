"""Processes of tests that begin with torch and paceline imported: forks of one server, which imports them once."""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
MODULES = [
    "torch",
    "torch._dynamo",  # by the first optimizer
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor",
    "paceline.cli",
    "paceline.comm.process_group",
    "paceline.planner",
    "paceline.report.figures",
    "paceline.report.plan_figures",
    "paceline.run",
]
"""Some of them take seconds. There is one server, which learns of them when its first process starts."""
CONTEXT.set_forkserver_preload(MODULES)
