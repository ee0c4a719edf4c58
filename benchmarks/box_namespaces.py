"""The namespaces of a host in a box: a network, a name, processes, and mounts of its own.

They live as long as their first process, and that as long as its standard input is open at the other end, which the box
alone holds. So they go with the box, also where it is killed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from box_limits import BoxError

_READY = "ready"
_PROGRAMS = ("ip", "tc", "unshare", "nsenter", "taskset", "mount", "env")
_NAMESPACES = {"--net": "net", "--uts": "uts", "--ipc": "ipc", "--mount": "mnt", "--pid": "pid_for_children"}
"""The option of `unshare` and `nsenter`, and the file below /proc/PID/ns."""
_FIRST_PROCESS = """
hostname "$1" && mount -t tmpfs paceline-box /dev/shm &&
printf '%s\\n' "$3" >/dev/shm/hosts && mount --bind /dev/shm/hosts /etc/hosts &&
mount -t tmpfs -o "size=$2" paceline-box /dev/shm || exit 1
echo ready
cat
exit
"""
_JOIN_GROUP = 'while [ "$1" != -- ]; do echo $$ >"$1" || exit 125; shift; done; shift; exec "$@"'


def make_host(name: str, names: str, memory_bytes: int | None) -> contextlib.AbstractContextManager[int]:
    """Namespaces of a new host; the number of a process in them.

    Args:
        name: its host name.
        names: its /etc/hosts.
        memory_bytes: the most that its /dev/shm may hold; None: half of the machine's memory.
    """
    size = "50%" if memory_bytes is None else str(memory_bytes)
    unshare = ["unshare", *_NAMESPACES, "--fork", "--kill-child", "--mount-proc"]
    return kept([*unshare, "sh", "-c", _FIRST_PROCESS, "sh", name, size, names], name)


def enter(process: int, group: Sequence[Path], cpus: Sequence[int], command: Sequence[str]) -> list[str]:
    """A command that runs `command` in a host's control group, on its CPUs, in its namespaces, where this process is.

    Args:
        process: one in the namespaces.
        group: the files that a process writes its number into.
    """
    flags = [f"{flag}=/proc/{process}/ns/{file}" for flag, file in _NAMESPACES.items()]
    return [
        *("sh", "-c", _JOIN_GROUP, "sh", *map(str, group), "--"),
        *("taskset", "--cpu-list", ",".join(map(str, cpus))),
        *(sys.executable, "-ES", str(Path(__file__).with_name("box_slices.py"))),
        *("nsenter", *flags, "--", "env", f"--chdir={Path.cwd()}", "--"),
        *command,
    ]


@contextlib.contextmanager
def kept(command: list[str], what: str) -> Iterator[int]:
    """A process that says when it is ready, and ends with its standard input; its number.

    It is in a session of its own, out of reach of a terminal's Ctrl-C.
    """
    process = subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        if process.stdout.readline().strip() != _READY:
            raise BoxError(
                f"{what} could not be made: {process.stderr.read().strip()}",
                cause="the kernel, or the container that this runs in, allows no new namespaces, mounts or TUN devices",
                next_step="run it on a machine of its own or in a privileged container",
            )
        yield process.pid
    finally:
        # Not waited for: closing may fail where the process has died, and there is nothing to write.
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
        try:
            process.wait(timeout=15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        process.stdout.close()
        process.stderr.close()


def require_root(delayed: bool) -> None:
    """Raise `BoxError` where a box cannot be built, naming what is missing."""
    if sys.platform != "linux":
        raise BoxError(f"a box needs Linux, and this is {sys.platform}", next_step="use a Linux machine")
    if os.geteuid() != 0:
        raise BoxError(
            "a box needs root: it makes network namespaces and control groups",
            next_step="run it with sudo, on a machine where that does no harm",
        )
    missing = [program for program in _PROGRAMS if shutil.which(program) is None]
    if missing:
        raise BoxError(
            f"a box needs the programs {', '.join(missing)}, which are not here",
            next_step="install iproute2 and util-linux",
        )
    if delayed and not Path("/dev/net/tun").exists():
        raise BoxError(
            "a delay needs /dev/net/tun, which is not here",
            cause="the kernel was built without CONFIG_TUN, or this container has no such device",
            next_step="load the module `tun`, or ask for no delay",
        )
