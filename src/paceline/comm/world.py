"""Joining the workers of a run: who am I, where is the store, which device is mine."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import os
import socket
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import TCPStore

from paceline.comm.gloo_threads import let_gloo_wait_its_turn
from paceline.comm.group import Group
from paceline.errors import LaunchError, OptionError
from paceline.measure.machine import describe_host, usable_cores
from paceline.records import Cluster, Host, Layout

AUTO = "auto"
TRANSPORTS = (AUTO, "gloo")
"""What may carry tensors between workers on CPUs; `auto`: shared memory within a host, gloo between hosts."""
TRANSPORT_VARIABLE = "PACELINE_TRANSPORT"
"""The environment's variable that says what `auto` means: one of `TRANSPORTS`."""
_HOSTS_UNKNOWN = "LOCAL_RANK and LOCAL_WORLD_SIZE of all workers do not tell who shares a host"


@dataclasses.dataclass
class Known:
    """What the planner knows that a training keeps to; before it does, nothing."""

    cuts_of: Callable[[Layout], Sequence[int]] | None = None
    """On rank 0: where a layout's pipeline is cut, as its forecast has it. See `Forecaster.cuts_of`."""


@dataclasses.dataclass(frozen=True)
class World:
    """All workers of a launch, as one of them sees it."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    device: torch.device
    timeout_s: float
    transport: str = AUTO
    groups: dict[tuple[int, ...], Group | None] = dataclasses.field(default_factory=dict)
    """Those that were made, by the ranks of their members."""
    in_use: set[tuple[int, ...]] = dataclasses.field(default_factory=set)
    """Which of them the mesh that was made last has; `release_groups` leaves them."""
    cores: int = dataclasses.field(default_factory=lambda: len(usable_cores()))
    """Of this host, before a worker was bound to its share."""
    hosts: tuple[int, ...] = ()
    """Of each rank, the first rank on its host. Empty where the launcher did not tell, and with NCCL."""
    known: Known = dataclasses.field(default_factory=Known)

    def group(self, size: int) -> Group | None:
        """The group of the first `size` ranks; None on a rank outside it.

        A collective call: every rank of the world makes it, in the same order.
        """
        return self.group_of(tuple(range(size)), busy=size)

    def group_of(self, ranks: tuple[int, ...], *, busy: int, mailbox: bool = False) -> Group | None:
        """The group of `ranks`, ascending; None on a rank outside it. A collective call like `group`.

        Args:
            busy: how many workers compute at a time, in the group or not.
            mailbox: whether its workers send each other messages.
        """
        if ranks not in self.groups:
            self.groups[ranks] = self._make_group(ranks, busy)
        group = self.groups[ranks]
        if group is not None and mailbox:
            self._let_send(group, busy)
        return group

    @contextlib.contextmanager
    def group_for_a_while(
        self, ranks: tuple[int, ...], *, busy: int, mailbox: bool = False
    ) -> Iterator[Group | None]:
        """`group_of`, with a group that is gone afterwards, and with it what was awaited ahead, however large.

        After an error it stays: others may be dead, and leaving in good order needs them.
        """
        group = self._make_group(ranks, busy, anew=True)
        if group is not None and mailbox:
            self._let_send(group, busy)
        yield group
        if group is not None:
            group.leave()

    def _let_send(self, group: Group, busy: int) -> None:
        """Have its workers send each other messages."""
        group.open_links()
        # In a group on several hosts messages go through gloo, also those of two workers that share one.
        if self._are_on_one_host(group.ranks) and self._shares_memory(group) and not group.has_mailbox:
            group.open_mailbox(self.local_size, spins=self._has_cores_for(busy))

    def _make_group(self, ranks: tuple[int, ...], busy: int, *, anew: bool = False) -> Group | None:
        """
        Args:
            anew: a process group of its own, whatever there is.
        """
        if self.size == 1 or len(ranks) == 1:
            return Group.alone(self.device, self.rank) if self.rank in ranks else None
        if ranks == tuple(range(self.size)) and not anew:
            process_group = dist.group.WORLD
        else:
            process_group = dist.new_group(list(ranks), timeout=datetime.timedelta(seconds=self.timeout_s))
            let_gloo_wait_its_turn()
        if self.rank not in ranks:
            return None
        group = Group(process_group, ranks, ranks.index(self.rank), self.device, self.timeout_s)
        group.is_over_network = len({self.hosts[r] for r in ranks}) > 1 if self.hosts else False
        if self._shares_memory(group):
            if self.hosts:
                hosts = [self.hosts[r] for r in ranks]
                group.share_memory(hosts, self.local_size, spins=self._has_cores_for(busy))
            else:
                group.why_no_memory = _HOSTS_UNKNOWN
        return group

    def _shares_memory(self, group: Group) -> bool:
        asked_for = self.device.type == "cpu" and self.transport == AUTO
        return asked_for and group.size > 1 and not group.why_no_memory

    def _are_on_one_host(self, ranks: tuple[int, ...]) -> bool:
        """Of ascending ranks; hosts are numbered by rank."""
        return bool(self.hosts) and self.hosts[ranks[0]] == self.hosts[ranks[-1]]

    def _has_cores_for(self, busy: int) -> bool:
        return min(busy, self.local_size) <= self.cores

    def release_groups(self, but: int) -> None:
        """Give back what the groups hold that are not used any more.

        Kept are the group of the first `but` ranks and those of the mesh that was made last.
        A collective call, as a group without shared memory goes on through gloo.
        """
        kept = {*self.in_use, tuple(range(but))}
        for ranks, group in self.groups.items():
            if group is not None and ranks not in kept:
                group.close()

    def forget_rooms(self) -> None:
        """Have all groups give back what they keep to receive into. None of their operations is under way."""
        for group in self.groups.values():
            if group is not None:
                group.forget_rooms()

    def leave(self) -> None:
        """Give back all groups. Without it gloo's threads abort the interpreter at exit."""
        for group in self.groups.values():
            if group is not None:
                group.close()
        self.groups.clear()
        self.in_use.clear()
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def resolve_transport(transport: str, device_kind: str) -> str:
    """The transport to use; `auto` is what the environment's PACELINE_TRANSPORT says, if it says something.

    Raises:
        OptionError: it is not one of `TRANSPORTS`, or the device does not leave the choice.
    """
    name = "--transport"
    if transport == AUTO and os.environ.get(TRANSPORT_VARIABLE):
        name, transport = f"{TRANSPORT_VARIABLE} of the environment", os.environ[TRANSPORT_VARIABLE]
    if transport not in TRANSPORTS:
        raise OptionError(f"{name} is {transport!r}", next_step=f"use {' or '.join(TRANSPORTS)}")
    if transport != AUTO and device_kind != "cpu":
        raise OptionError(
            f"{name} is {transport!r}, and the workers compute on {device_kind}",
            cause="GPUs talk through NCCL",
            next_step=f"leave out {name}, or give {AUTO}",
        )
    return transport


def join(
    device_kind: str, timeout_s: float, loopback_port: int | None = None, transport: str = AUTO
) -> World:
    """Join the workers that the environment names, as the elastic agent and torchrun set it.

    Args:
        device_kind: `cpu` (gloo) or `cuda` (NCCL, device `LOCAL_RANK`).
        timeout_s: the limit of every wait for another worker.
        loopback_port: where all workers are on this host: rank 0 keeps the store on this port of
            127.0.0.1, and gloo is kept to the loopback interface. None: the launcher's own rendezvous.
        transport: one of `TRANSPORTS`, see `resolve_transport`; gloo where any worker's says gloo.

    Raises:
        LaunchError: the port is in use, or the other workers did not come.
        OptionError: no such transport.
    """
    transport = resolve_transport(transport, device_kind)
    environment = os.environ
    rank, size = _number(environment, "RANK", 0), _number(environment, "WORLD_SIZE", 1)
    local_rank = _number(environment, "LOCAL_RANK", 0)
    local_size = _number(environment, "LOCAL_WORLD_SIZE", 1)
    device = torch.device("cuda", local_rank) if device_kind == "cuda" else torch.device("cpu")
    if device_kind == "cuda":
        torch.cuda.set_device(device)
    world = World(rank, size, local_rank, local_size, device, timeout_s, transport)
    if size == 1:
        return world
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "nccl" if device_kind == "cuda" else "gloo"
    try:
        if loopback_port is None:
            dist.init_process_group(backend, timeout=timeout)
        else:
            _keep_gloo_on_loopback()
            store = _loopback_store(rank, size, loopback_port, timeout)
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        if device_kind == "cpu":
            let_gloo_wait_its_turn()
            own = local_rank, local_size, TRANSPORTS.index(transport)
            places = _all_gather_numbers(own, size)
            # The hosts' environments may differ: all take the way that one of them asks for.
            transport = TRANSPORTS[max(asked for _, _, asked in places)]
            hosts = find_hosts([(place, of) for place, of, _ in places])
            world = dataclasses.replace(world, hosts=hosts, transport=transport)
    except (RuntimeError, ValueError) as error:
        raise LaunchError(
            f"rank {rank}: joining the other {size - 1} workers failed within {timeout_s:.0f} s",
            cause=str(error).splitlines()[0],
            next_step="see whether a worker died before this one (its log is in the run's directory), "
            "and whether the hosts can reach each other",
        ) from error
    return world


def gather_cluster(everyone: Group, world: World) -> Cluster:
    """The hosts of all workers, in the order of their ranks. A collective call of all workers."""
    own = describe_host(world.device.type, world.local_size).to_json()
    firsts = [
        host for host in everyone.gather_json(own if world.local_rank == 0 else None, "the hosts") if host
    ]
    return Cluster(hosts=tuple(Host.from_json(host) for host in firsts))


def _all_gather_numbers(own: tuple[int, ...], size: int) -> list[tuple[int, ...]]:
    """Those of every rank."""
    numbers = [torch.zeros(len(own), dtype=torch.int64) for _ in range(size)]
    dist.all_gather(numbers, torch.tensor(own))
    return [tuple(row.tolist()) for row in numbers]


def find_hosts(places: Sequence[tuple[int, int]]) -> tuple[int, ...]:
    """Of each rank, the first rank on its host. Torchrun numbers the workers host after host.

    Args:
        places: `(local rank, local size)` of every rank.

    Returns:
        Nothing where these numbers cannot be such a numbering.
    """
    hosts: list[int] = []
    while len(hosts) < len(places):
        first = len(hosts)
        _, local_size = places[first]
        if local_size < 1 or list(places[first : first + local_size]) != [
            (place, local_size) for place in range(local_size)
        ]:
            return ()
        hosts += [first] * local_size
    return tuple(hosts)


def _loopback_store(rank: int, size: int, port: int, timeout: datetime.timedelta) -> TCPStore:
    """A store that only this host can reach: TCPStore itself would listen on every interface."""
    if rank != 0:
        return TCPStore("127.0.0.1", port, size, is_master=False, timeout=timeout)
    listener = listen_on_loopback(port)
    return TCPStore(
        "127.0.0.1",
        listener.getsockname()[1],
        size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )


def listen_on_loopback(port: int) -> socket.socket:
    """A socket that listens on `port` of 127.0.0.1 (0: any free one).

    Raises:
        LaunchError: the port is in use.
    """
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise LaunchError(
            f"port {port} of 127.0.0.1 cannot be used: {error.strerror}",
            cause="another program, perhaps another run, listens there",
            next_step="leave out --port to take a free one, or give another",
        ) from error
    listener.listen(128)
    return listener


def _keep_gloo_on_loopback() -> None:
    names = {name for _, name in socket.if_nameindex()}
    for name in ("lo", "lo0"):
        if name in names:
            os.environ["GLOO_SOCKET_IFNAME"] = name
            return


def _number(environment: Mapping[str, str], key: str, default: int) -> int:
    try:
        return int(environment.get(key, default))
    except ValueError as error:
        raise LaunchError(
            f"the environment has {key}={environment[key]!r}, which is no number",
            next_step="start workers with `paceline train` or `torchrun`, which set it",
        ) from error


def share_of_cores(cores: Sequence[int], local_rank: int, local_size: int) -> tuple[int, ...]:
    """The cores of worker `local_rank` among `local_size` on this host: equal, contiguous shares.

    With more workers than cores each has one core, and shares it.
    """
    if local_size >= len(cores):
        return (cores[local_rank % len(cores)],)
    start = local_rank * len(cores) // local_size
    return tuple(cores[start : (local_rank + 1) * len(cores) // local_size])
