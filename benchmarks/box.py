"""A cluster in a box: real hosts and a real network on one Linux machine, for measuring what a cluster would do.

    python benchmarks/box.py --hosts 2 --bandwidth 100mbit --delay 1ms -- paceline train examples/text.py --steps 20
    python benchmarks/box.py --hosts 4 --cores 0.4 --memory 2G -- paceline plan examples/image.py
    python benchmarks/box.py --check        # asked for and measured: bandwidth, round trip, share of a core, memory
    python benchmarks/box.py --clean        # remove what is left of boxes whose maker died

Every host is a set of namespaces (network, name, processes, mounts with a /dev/shm of its own) and a control group
that limits its processor time and memory; box_network.py describes its cables. The command is started on all hosts by
torchrun. It needs root.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import shutil
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from box_limits import (
    BoxError,
    ControlGroup,
    Hierarchy,
    new_name,
    remove_left_over,
    share_out,
    this_hierarchy,
)
from box_namespaces import enter, kept, make_host, require_root
from box_network import INTERFACE, address, lay_cables
from box_processes import Ended, Start, Tell, carry_out

from paceline.errors import PacelineError

MOST_HOSTS = 8
_PORT = 29500
_KEEPER = Path(__file__).with_name("box_keeper.py")


@dataclasses.dataclass(frozen=True)
class BoxHost:
    """One host of a box."""

    cores: float | None = None
    """Seconds of processor time in a second; it sees as many CPUs as it has begun cores. None: the whole machine's."""
    memory_bytes: int | None = None
    """Of all its processes, its /dev/shm and the files that it has read; None: no limit."""
    workers: int = 1
    """Processes that `Box.torchrun` and `Box.start_workers` start on it."""
    waits: bool = False
    """It needs little of its cores, as a host does whose GPUs compute: they are others' as well, and nothing holds it
    to its share."""

    def __post_init__(self) -> None:
        if self.cores is not None and not self.cores > 0:
            raise BoxError(f"a host with {self.cores:g} cores", next_step="give it more than none")
        if self.memory_bytes is not None and self.memory_bytes < 1 << 20:
            raise BoxError(
                f"a host with {self.memory_bytes} bytes of memory",
                next_step="give it a mebibyte at least; Python and torch take about 300",
            )
        if self.workers < 1:
            raise BoxError(f"a host with {self.workers} workers", next_step="give it one at least")


class Box:
    """A cluster that is there as long as the `with` block. Nothing of it outlives this process, however that ends.

    Args:
        hosts: one to eight.
        bandwidth_bits_per_s: what a stream of TCP carries over a host's cable, in each direction; None: no limit.
        delay_s: from one host to another, on top of what the machine itself takes; a round trip has two. The least that
            can be kept is about 0.1 ms.

    Raises:
        BoxError: on entering: this is not root on Linux, or a program or a part of the kernel is missing: it is named.
    """

    def __init__(
        self, hosts: Sequence[BoxHost], *, bandwidth_bits_per_s: float | None = None, delay_s: float = 0.0
    ) -> None:
        if not 1 <= len(hosts) <= MOST_HOSTS:
            raise BoxError(f"a box of {len(hosts)} hosts", next_step=f"give it 1 to {MOST_HOSTS}")
        if bandwidth_bits_per_s is not None and bandwidth_bits_per_s < 1e6:
            raise BoxError(
                f"a bandwidth of {bandwidth_bits_per_s:g} bit/s", next_step="give 1 Mbit/s at least"
            )
        if delay_s < 0:
            raise BoxError(f"a delay of {delay_s:g} s", next_step="give none, or more")
        self.hosts = tuple(hosts)
        self.bandwidth_bits_per_s, self.delay_s = bandwidth_bits_per_s, delay_s
        self._stack = contextlib.ExitStack()
        self._namespaces: list[int] = []
        """Of each host, a process in its namespaces."""
        self._groups: list[ControlGroup] = []
        cpus = sorted(os.sched_getaffinity(0))
        self._cpus = share_out([None if host.waits else host.cores for host in hosts], cpus)
        for number, host in enumerate(hosts):
            if host.waits and host.cores is not None:
                self._cpus[number] = sorted(
                    cpus[(number + place) % len(cpus)]
                    for place in range(min(math.ceil(host.cores), len(cpus)))
                )

    def __enter__(self) -> Self:
        require_root(self.delay_s > 0)
        hierarchy = this_hierarchy()
        remove_left_over(hierarchy)
        with contextlib.ExitStack() as stack:
            self._build(stack, hierarchy)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stack.close()
        self._namespaces.clear()
        self._groups.clear()

    def _build(self, stack: contextlib.ExitStack, hierarchy: Hierarchy) -> None:
        name = new_name()
        self._groups = [ControlGroup(hierarchy, f"{name}-host{number}") for number in range(len(self.hosts))]
        directories = [str(path) for group in self._groups for path in group.directories]
        keeper = [sys.executable, str(_KEEPER), str(self.delay_s), *directories]
        switch = stack.enter_context(kept(["unshare", "--net", *keeper], "the switch"))
        names = "\n".join(["127.0.0.1 localhost", *map(_names_of, range(len(self.hosts)))])
        for number, (host, group) in enumerate(zip(self.hosts, self._groups, strict=True)):
            made = make_host(f"host{number}", names, host.memory_bytes)
            self._namespaces.append(stack.enter_context(made))
            stack.callback(group.remove)
            group.make(None if host.waits else host.cores, host.memory_bytes)
        lay_cables(switch, self._namespaces, self.bandwidth_bits_per_s, self.delay_s > 0)

    @property
    def num_workers(self) -> int:
        return sum(host.workers for host in self.hosts)

    def run(
        self,
        command_for: Callable[[int], Sequence[str]],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        tell: Tell | None = None,
    ) -> list[Ended]:
        """Run a command on each host at the same time; what became of each, in the order of the hosts.

        All are ended when the time is over, or some seconds after one of them has failed.

        Args:
            command_for: given a host's number.
            environment: on top of this process's own. GLOO_SOCKET_IFNAME, MASTER_ADDR and MASTER_PORT are set.
            tell: called with each line of output as it comes; see `carry_out`.
        """
        starts = [self._start(host, command_for(host), environment) for host in range(len(self.hosts))]
        return carry_out(starts, self._groups, timeout_s, tell)

    def torchrun(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        tell: Tell | None = None,
    ) -> list[Ended]:
        """As `run`: on each host a torchrun, which starts `command`, a program and its arguments, for each worker."""

        def torchrun(number: int) -> list[str]:
            return [
                *(sys.executable, "-m", "torch.distributed.run", "--no-python"),
                *(f"--nnodes={len(self.hosts)}", f"--node-rank={number}"),
                f"--nproc-per-node={self.hosts[number].workers}",
                *(f"--master-addr={address(0)}", f"--master-port={_PORT}"),
                *command,
            ]

        return self.run(torchrun, timeout_s=timeout_s, environment=environment, tell=tell)

    def start_workers(
        self,
        command: Sequence[str],
        *,
        timeout_s: float,
        environment: Mapping[str, str] | None = None,
        tell: Tell | None = None,
    ) -> list[Ended]:
        """As `torchrun`, with the box itself in its place, whose agents would take memory and time from small hosts.

        Returns:
            What became of each worker, by rank.
        """
        starts = []
        for number, host in enumerate(self.hosts):
            for local_rank in range(host.workers):
                own = {
                    "RANK": str(len(starts)),
                    "WORLD_SIZE": str(self.num_workers),
                    "LOCAL_RANK": str(local_rank),
                    "LOCAL_WORLD_SIZE": str(host.workers),
                }
                starts.append(self._start(number, command, {**(environment or {}), **own}))
        return carry_out(starts, self._groups, timeout_s, tell)

    def sent_bytes(self, host: int) -> int:
        """What a host has sent so far, headers included."""
        return self._device_count(host, 8)

    def received_bytes(self, host: int) -> int:
        return self._device_count(host, 0)

    def _device_count(self, host: int, column: int) -> int:
        devices = Path(f"/proc/{self._namespaces[host]}/net/dev").read_text()
        _, _, counts = devices.partition(f"{INTERFACE}:")
        return int(counts.split()[column])

    def _start(self, host: int, command: Sequence[str], environment: Mapping[str, str] | None) -> Start:
        """Through the control group and the CPUs into the namespaces, to where this process is."""
        return Start(
            host=host,
            command=enter(
                self._namespaces[host], self._groups[host].process_files, self._cpus[host], command
            ),
            environment={
                **os.environ,
                "GLOO_SOCKET_IFNAME": INTERFACE,
                "MASTER_ADDR": address(0),
                "MASTER_PORT": str(_PORT),
                **(environment or {}),
            },
        )


def _names_of(host: int) -> str:
    """Lines of /etc/hosts. torch's store asks for the name of the second form."""
    return f"{address(host)} host{host}\n::ffff:{address(host)} host{host}"


def _print(start: Start, line: str, is_error: bool) -> None:
    print(f"host{start.host} | {line}", file=sys.stderr if is_error else sys.stdout, flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    from box_options import parse

    options = parse(__doc__ or "", arguments)
    # As by Ctrl-C: the `with` blocks end, and with them the box.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    if options.clean:
        require_root(False)
        for path in remove_left_over(this_hierarchy()):
            print(f"removed {path}")
        return 0
    if options.check:
        from box_check import check

        return 0 if check(options) else 1
    hosts = [BoxHost(*limits) for limits in options.hosts]
    with Box(hosts, bandwidth_bits_per_s=options.bandwidth_bits_per_s, delay_s=options.delay_s) as box:
        # Lines have their host's name before them.
        columns = shutil.get_terminal_size().columns - len("host0 | ")
        ended = box.torchrun(
            options.command,
            timeout_s=options.timeout_s,
            environment={"COLUMNS": str(columns)},
            tell=_print,
        )
        for number in range(len(hosts)):
            sent, received = box.sent_bytes(number), box.received_bytes(number)
            print(f"host{number} sent {sent / 1e6:,.1f} MB and received {received / 1e6:,.1f} MB")
    for end in ended:
        if end.failure:
            print(f"host{end.host}: {end.failure}", file=sys.stderr)
    return next((end.exit_code for end in ended if end.exit_code), 0)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except PacelineError as error:
        sys.exit(str(error))
    except KeyboardInterrupt:
        sys.exit(130)
