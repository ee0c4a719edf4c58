"""What a host of a box may use of this machine: its CPUs and its memory, by control groups of either version.

Nothing here needs more than Python itself: the box's keeper uses it too, after the box has died.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from paceline.errors import PacelineError

PREFIX = "paceline-box-"
"""Of the names of all control groups; the maker's process number and its start time follow."""
_PERIOD_US = 10_000
"""Within which a quota is granted, at least. Four hosts of 0.45 cores pause for 4 to 8 ms with it, for 8 to 12 ms with
20 ms, and have what they were given; with 5 ms they pause no shorter, and have 10 % too little."""
_LEAST_GRANTED_US = 4_000
"""Within a period: the kernel takes stock every 4 ms. Eight hosts of 0.24 cores pause no longer with 17 ms than with
10, and have what they were given, not 1 to 7 % less."""
_WEIGHT = 16
"""Of a host with a quota against anything else that runs on the machine: what was asked for is to be had."""
_CONTROLLERS = ("cpu", "memory")
_REMOVAL_S = 10.0
_serial = itertools.count()


class BoxError(PacelineError):
    """A cluster in a box could not be built, or what ran on it failed."""


@dataclasses.dataclass(frozen=True)
class Hierarchy:
    """Where control groups can be made on this machine."""

    version: int
    parents: dict[str, Path]
    """By controller: the directory below which groups are made."""
    mounts: tuple[Path, ...]
    """Where left-over groups are looked for."""


def find_hierarchy(mountinfo: str, own: str) -> Hierarchy:
    """The controllers of processor time and memory, from the texts of /proc/self/mountinfo and /proc/self/cgroup.

    With version 1 groups are made below this process's own, so that its limits hold for them too. With version 2 a
    group that has processes can have no such children: there they are made at the top.

    Raises:
        BoxError: a controller is not mounted.
    """
    found: dict[str, tuple[Path, str]] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        root, mount = before.split()[3:5]
        kind, _, options = after.split(" ", 2)
        if kind == "cgroup2" and unified is None:
            unified = Path(mount)
        if kind == "cgroup":
            for name in set(options.split(",")) & set(_CONTROLLERS):
                found.setdefault(name, (Path(mount), root))
    if set(found) == set(_CONTROLLERS):
        paths = {
            name: path
            for _, names, path in (line.split(":", 2) for line in own.splitlines())
            for name in names.split(",")
        }
        parents = {}
        for name, (mount_point, root) in found.items():
            # A container may see only a part of the hierarchy: its own group is then the mount itself.
            inner = os.path.relpath(paths.get(name, "/"), root)
            parents[name] = mount_point if inner.startswith("..") else mount_point / inner
        return Hierarchy(1, parents, tuple(mount_point for mount_point, _ in found.values()))
    if unified is not None:
        return Hierarchy(2, dict.fromkeys(_CONTROLLERS, unified), (unified,))
    missing = ", ".join(sorted(set(_CONTROLLERS) - set(found)))
    raise BoxError(
        f"there is no control group for: {missing}",
        cause="no cgroup file system is mounted, or the kernel was built without it",
        next_step="mount cgroup2 on /sys/fs/cgroup, or use another machine or a privileged container",
    )


def this_hierarchy() -> Hierarchy:
    """That of this machine."""
    return find_hierarchy(Path("/proc/self/mountinfo").read_text(), Path("/proc/self/cgroup").read_text())


def new_name() -> str:
    """For a box of this process: nobody else has it, also after the process number was given away again."""
    return f"{PREFIX}{os.getpid()}-{_start_ticks(os.getpid())}-{next(_serial)}"


def is_left_over(name: str) -> bool:
    """Whether a control group's name is a box's whose maker is dead."""
    parts = name.removeprefix(PREFIX).split("-")
    if not name.startswith(PREFIX) or len(parts) < 3 or not (parts[0].isdecimal() and parts[1].isdecimal()):
        return False
    return _start_ticks(int(parts[0])) != int(parts[1])


def _start_ticks(pid: int) -> int | None:
    """When a process was started, in ticks since the machine was; None where there is no such process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else int(fields[19])


class ControlGroup:
    """The processes of one host, and what they may use together."""

    def __init__(self, hierarchy: Hierarchy, name: str) -> None:
        self._version = hierarchy.version
        self._parents = hierarchy.parents
        self._of = {controller: parent / name for controller, parent in hierarchy.parents.items()}

    @property
    def directories(self) -> list[Path]:
        """One for each controller; with version 2 one for all."""
        return list(dict.fromkeys(self._of.values()))

    def make(self, cores: float | None, memory_bytes: int | None) -> None:
        """
        Args:
            cores: seconds of processor time in a second; None: no limit.
            memory_bytes: None: no limit.

        Raises:
            BoxError: the kernel does not let us.
        """
        try:
            if self._version == 2:
                control = self._parents["cpu"] / "cgroup.subtree_control"
                control.write_text("+cpu +memory")
            for directory in self.directories:
                directory.mkdir()
            if cores is not None:
                self._limit_cores(cores)
            if memory_bytes is not None:
                self._limit_memory(memory_bytes)
        except OSError as error:
            raise BoxError(
                f"control group {error.filename}: {error.strerror}",
                cause="the controllers cpu and memory are not to be had here"
                if self._version == 2
                else "this process may not make or set control groups",
                next_step="run as root, outside of containers that may not change control groups",
            ) from error

    def _limit_cores(self, cores: float) -> None:
        period_us = max(_PERIOD_US, math.ceil(_LEAST_GRANTED_US / cores))
        quota_us = round(cores * period_us)
        directory = self._of["cpu"]
        if self._version == 2:
            (directory / "cpu.max").write_text(f"{quota_us} {period_us}")
            (directory / "cpu.weight").write_text(str(_WEIGHT * 100))
        else:
            (directory / "cpu.cfs_period_us").write_text(str(period_us))
            (directory / "cpu.cfs_quota_us").write_text(str(quota_us))
            (directory / "cpu.shares").write_text(str(_WEIGHT * 1024))

    def _limit_memory(self, memory_bytes: int) -> None:
        directory = self._of["memory"]
        if self._version == 2:
            limits = {"memory.max": memory_bytes, "memory.swap.max": 0}
        else:
            # Of memory and swap together; it cannot be less than that of memory.
            limits = {"memory.limit_in_bytes": memory_bytes, "memory.memsw.limit_in_bytes": memory_bytes}
        for name, limit in limits.items():
            # Without a file for swap the kernel does not count it, or there is none.
            if (directory / name).exists() or "sw" not in name:
                (directory / name).write_text(str(limit))

    @property
    def process_files(self) -> list[Path]:
        """A process that writes its number into them is in the group."""
        return [directory / "cgroup.procs" for directory in self.directories]

    def num_killed_for_memory(self) -> int:
        """Processes that the kernel has killed as they would not fit."""
        name = "memory.events" if self._version == 2 else "memory.oom_control"
        words = (self._of["memory"] / name).read_text().split()
        return int(words[words.index("oom_kill") + 1])

    def kill_all(self) -> None:
        """Kill every process in the group."""
        kill_all(self.directories)

    def remove(self) -> None:
        """Kill every process in the group, and remove it.

        Raises:
            BoxError: a process does not die.
        """
        remain = remove(self.directories)
        if remain:
            raise BoxError(
                f"control group {remain[0]} cannot be removed",
                cause="a process in it does not die: " + _read(remain[0] / "cgroup.procs").replace("\n", " "),
                next_step="remove it later with `python benchmarks/box.py --clean`",
            )


def kill_all(directories: Iterable[Path]) -> bool:
    """Send SIGKILL to every process of these groups; whether there were any."""
    any_left = False
    for directory in directories:
        for pid in _read(directory / "cgroup.procs").split():
            any_left = True
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
    return any_left


def remove(directories: Sequence[Path], patience_s: float = _REMOVAL_S) -> list[Path]:
    """Kill what is in these groups and remove them; returns those that could not be removed."""
    remain = list(directories)
    end_s = time.monotonic() + patience_s
    while True:
        kill_all(remain)
        for directory in remain:
            with contextlib.suppress(OSError):
                directory.rmdir()
        remain = [directory for directory in remain if directory.exists()]
        if not remain or time.monotonic() > end_s:
            return remain
        time.sleep(0.02)


def remove_left_over(hierarchy: Hierarchy) -> list[Path]:
    """Remove the groups of boxes whose makers are dead, with what still runs in them; returns those removed."""
    found = [
        path
        for mount in hierarchy.mounts
        for path in mount.rglob(f"{PREFIX}*")
        if path.is_dir() and is_left_over(path.name)
    ]
    remain = remove(found)
    return [path for path in found if path not in remain]


def share_out(cores: Sequence[float | None], cpus: Sequence[int]) -> list[list[int]]:
    """The CPUs of each host: as many as it has begun cores, those that are asked for least.

    Raises:
        BoxError: more is asked for than there is.
    """
    load = dict.fromkeys(cpus, 0.0)
    places = []
    for number, wanted in enumerate(cores):
        if wanted is None:
            places.append(list(cpus))
            continue
        count = math.ceil(wanted)
        chosen = sorted(sorted(load, key=lambda cpu: load[cpu])[:count])
        for cpu in chosen:
            load[cpu] += wanted / count
        if len(chosen) < count or max(load[cpu] for cpu in chosen) > 1 + 1e-9:
            total = sum(c for c in cores if c is not None)
            raise BoxError(
                f"host {number} of {len(cores)} with {wanted:g} cores cannot be placed: together they have {total:g}, "
                f"and this machine {len(cpus)}",
                cause="a host slower than asked for would make every measurement wrong",
                next_step="give the hosts fewer cores, and leave some for the links: about a tenth",
            )
        places.append(chosen)
    return places


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""
