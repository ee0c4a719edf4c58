"""The process in the switch of a box: it delays packets, and removes what the box leaves behind if it dies.

    python box_keeper.py DELAY_S DIRECTORY…

It lives as long as its standard input is open at the other end, which the box alone holds: kill -9 closes it too.
Then it kills what is in the control groups DIRECTORY… and removes them. With it goes the switch's network namespace, as
those of the hosts go with their processes, and so all cables.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import fcntl
import os
import select
import struct
import sys
import time
from pathlib import Path

from box_limits import remove
from box_network import RELAY

# linux/if_tun.h, linux/prctl.h
_TUNSETIFF, _TUNSETOFFLOAD = 0x400454CA, 0x400454D0
_TUN, _NO_PACKET_INFORMATION, _OFFLOAD_HEADER = 0x0001, 0x1000, 0x4000
_CHECKSUMS, _TCP_V4, _TCP_V6 = 1, 2, 4
_PR_SET_TIMERSLACK = 29
_MOST_BYTES = 1 << 17
_AT_ONCE = 32
LEAD_S = 120e-6
"""What reading, waking and writing take themselves: so much earlier a packet is sent on."""


def open_relay() -> int:
    """The switch's TUN device, which reads and writes packets as large as the kernel has them, not cut yet."""
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    flags = _TUN | _NO_PACKET_INFORMATION | _OFFLOAD_HEADER
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", RELAY.encode(), flags))
    fcntl.ioctl(device, _TUNSETOFFLOAD, _CHECKSUMS | _TCP_V4 | _TCP_V6)
    return device


def be_punctual() -> None:
    """Run before everything else, and be woken to the microsecond: hosts may keep all cores busy."""
    ctypes.CDLL(None).prctl(_PR_SET_TIMERSLACK, 1, 0, 0, 0)
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(10))
    except OSError:
        # Where real time is not to be had the highest of the other priorities is next best.
        os.nice(-20)


def relay(device: int, delay_s: float) -> None:
    """Send every packet on `delay_s` after it came, until standard input ends."""
    held_s = max(0.0, delay_s - LEAD_S)
    waiting: collections.deque[tuple[float, bytes]] = collections.deque()
    now, read, write = time.monotonic, os.read, os.write
    while True:
        at_s = now()
        while waiting and waiting[0][0] <= at_s:
            # A packet that the kernel does not take is lost, as on a cable.
            with contextlib.suppress(OSError):
                write(device, waiting.popleft()[1])
            at_s = now()
        readable, _, _ = select.select([device, 0], [], [], waiting[0][0] - at_s if waiting else None)
        if 0 in readable:
            return
        if device in readable:
            due_s = now() + held_s
            for _ in range(_AT_ONCE):
                try:
                    waiting.append((due_s, read(device, _MOST_BYTES)))
                except BlockingIOError:
                    break


def main() -> None:
    delay_s = float(sys.argv[1])
    device = open_relay() if delay_s > 0 else None
    print("ready", flush=True)
    try:
        if device is not None:
            be_punctual()
            relay(device, delay_s)
        else:
            sys.stdin.read()
    finally:
        remove([Path(text) for text in sys.argv[2:]])


if __name__ == "__main__":
    main()
