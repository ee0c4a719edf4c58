"""Starting workers on this host, with torch.distributed's elastic agent."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import Any

from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException, Std
from torch.distributed.elastic.multiprocessing.api import SubprocessContext
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from paceline.comm.world import listen_on_loopback
from paceline.launch.failure import first_failure
from paceline.launch.spec import RunSpec

_SHUTDOWN_TIMEOUT_S = 15
_WORKER_MODULE = "paceline.launch.worker"


def free_port(wanted: int | None) -> int:
    """A port of 127.0.0.1 that can be listened on: `wanted`, or any.

    Raises:
        LaunchError: the port is in use.
    """
    with listen_on_loopback(wanted or 0) as listener:
        return int(listener.getsockname()[1])


def launch(spec: RunSpec, num_workers: int) -> None:
    """Run `spec` on `num_workers` workers of this host; return when all of them have ended.

    Their output goes to files below `logs/` in the run's directory.

    Raises:
        WorkerError: the first worker that failed, by rank, with the cause. The others were ended.
        KeyboardInterrupt: the launcher was interrupted; the workers have stopped in order.
    """
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    # The workers keep a store of their own on loopback: the agent's would listen on every interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_SHUTDOWN_TIMEOUT_S)
    logs = spec.directory / "logs"
    logs.mkdir(exist_ok=True)
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=num_workers,
        run_id=spec.directory.name,
        rdzv_backend="c10d",
        rdzv_endpoint="",
        rdzv_configs={"store_type": "file"},
        local_addr="127.0.0.1",
        max_restarts=0,
        monitor_interval=0.1,
        logs_specs=DefaultLogsSpecs(log_dir=str(logs), redirects=Std.ALL),
    )
    command = ["-m", _WORKER_MODULE, str(spec.write())]
    try:
        with _ending_within(min(spec.timeout_s, _SHUTDOWN_TIMEOUT_S)):
            elastic_launch(config, sys.executable)(*command)
    except ChildFailedError as error:
        exit_codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        raise first_failure(spec.directory, exit_codes) from None
    except SignalException:
        raise KeyboardInterrupt from None


@contextlib.contextmanager
def _ending_within(limit_s: float) -> Iterator[None]:
    """Have the agent kill workers that a SIGTERM has not ended by then.

    Where one has failed it gives the others 30 s, and cannot be told otherwise; who is stopped or hangs needs them all.
    """
    close = SubprocessContext._close

    def close_soon(self: SubprocessContext, death_sig: Any, timeout: float = limit_s) -> None:
        close(self, death_sig, min(timeout, limit_s))  # type: ignore[arg-type]

    SubprocessContext._close = close_soon  # type: ignore[method-assign]
    try:
        yield
    finally:
        SubprocessContext._close = close  # type: ignore[method-assign]
