"""What this host is: cores, memory, devices, versions."""

from __future__ import annotations

import functools
import math
import os
import platform
import socket
from pathlib import Path

import torch

from paceline._version import VERSION
from paceline.records import Host


@functools.cache
def usable_cores() -> tuple[int, ...]:
    """Numbers of the cores that this process was given, fewer where a cgroup's quota allows fewer.

    Found once: a worker later binds itself to its own share of them.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = tuple(sorted(os.sched_getaffinity(0)))
    else:
        cores = tuple(range(os.cpu_count() or 1))
    quota = _cgroup_quota_cores()
    return cores if quota is None else cores[: max(1, math.ceil(quota))]


def _cgroup_quota_cores() -> float | None:
    """How many cores' worth of time the cgroup grants, or None where it sets no limit."""
    v2 = _read_words(Path("/sys/fs/cgroup/cpu.max"))
    if len(v2) == 2 and v2[0] != "max":
        return int(v2[0]) / int(v2[1])
    quota = _read_words(Path("/sys/fs/cgroup/cpu/cpu.cfs_quota_us"))
    period = _read_words(Path("/sys/fs/cgroup/cpu/cpu.cfs_period_us"))
    if quota and period and int(quota[0]) > 0:
        return int(quota[0]) / int(period[0])
    return None


def _read_words(path: Path) -> list[str]:
    try:
        return path.read_text().split()
    except OSError:
        return []


def device_kind() -> str:
    """`cuda` where a GPU is usable, else `cpu`."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def local_workers(device: str) -> int:
    """How many workers this host can carry: one per GPU, or one per core."""
    return torch.cuda.device_count() if device == "cuda" else len(usable_cores())


def describe_host(device: str, workers: int) -> Host:
    """This host as a record; memory is that of its workers' devices where they have their own."""
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name, memory_bytes = properties.name, properties.total_memory * workers
    else:
        name, memory_bytes = _cpu_name(), _memory_bytes()
    return Host(
        name=socket.gethostname(),
        device=device,
        device_name=name,
        cores=len(usable_cores()),
        memory_bytes=memory_bytes,
        workers=workers,
    )


def _cpu_name() -> str:
    for line in _read_lines(Path("/proc/cpuinfo")):
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _memory_bytes() -> int:
    """Of this machine, or what cgroups let this process and its like have of it."""
    whole = [
        int(line.split()[1]) * 1024
        for line in _read_lines(Path("/proc/meminfo"))
        if line.startswith("MemTotal:")
    ]
    return min([*whole, *(limit for limit, _ in _cgroup_memory())], default=0)


def available_memory_bytes(device: str) -> int:
    """What this process may still take, on the GPU where it trains there; 0 where that is not known."""
    if device == "cuda":
        kept = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return int(torch.cuda.mem_get_info()[0]) + kept
    free = [
        int(line.split()[1]) * 1024
        for line in _read_lines(Path("/proc/meminfo"))
        if line.startswith("MemAvailable:")
    ]
    return min([*free, *(limit - used for limit, used in _cgroup_memory())], default=0)


def _cgroup_memory() -> list[tuple[int, int]]:
    """Limit and use in bytes of the cgroups of this process, where they set a limit; files that can go are not used."""
    found = []
    for line in _read_lines(Path("/proc/self/cgroup")):
        _, controllers, path = line.split(":", 2)
        if controllers == "memory":
            names = "memory/" + path.lstrip("/"), "memory.limit_in_bytes", "memory.usage_in_bytes"
        elif controllers == "":
            names = path.lstrip("/"), "memory.max", "memory.current"
        else:
            continue
        directory = Path("/sys/fs/cgroup") / names[0]
        limit, used = (_read_words(directory / name) for name in names[1:])
        if limit and used and limit[0] != "max":
            # Files that were read a while ago go when memory is wanted.
            lines = [line.split() for line in _read_lines(directory / "memory.stat")]
            counts = {words[0]: int(words[1]) for words in lines if len(words) == 2}
            idle = counts.get("total_inactive_file", counts.get("inactive_file", 0))
            found.append((int(limit[0]), max(0, int(used[0]) - idle)))
    return found


def _read_lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []


def peak_memory_bytes(device: str) -> int:
    """The most memory that this process has held: on the GPU where it trains there, else resident."""
    return (
        torch.cuda.max_memory_allocated() + _context_bytes() if device == "cuda" else _status_bytes("VmHWM")
    )


def _context_bytes() -> int:
    """Of the GPU's memory, what is taken and not torch's: the driver's, its kernels', and that of other programs."""
    free, whole = torch.cuda.mem_get_info()
    return max(0, whole - free - torch.cuda.memory_reserved())


def held_memory_bytes(device: str) -> int:
    """The memory that this process holds now: as `peak_memory_bytes`."""
    return torch.cuda.memory_allocated() + _context_bytes() if device == "cuda" else _status_bytes("VmRSS")


def forget_peak_memory(device: str) -> bool:
    """Have `peak_memory_bytes` begin again with what is held now; whether the system can do that."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return True
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def file_memory_bytes(device: str) -> int:
    """Of what is held: pages of files, as the code of libraries, which all processes that map them have in common."""
    return 0 if device == "cuda" else _status_bytes("RssFile")


def launcher_memory_bytes() -> int:
    """What the process that has started this one holds for itself, where the same limits of memory hold for both."""
    parent = Path(f"/proc/{os.getppid()}")
    if _read_lines(parent / "cgroup") != _read_lines(Path("/proc/self/cgroup")):
        return 0
    return _status_bytes("RssAnon", parent)


def _status_bytes(name: str, process: Path = Path("/proc/self")) -> int:
    """0 where the system does not tell."""
    for line in _read_lines(process / "status"):
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    return 0


def versions() -> dict[str, str]:
    return {
        "paceline": VERSION,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }
