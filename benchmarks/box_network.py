"""The network of a box: each host has one cable to a switch, shaped in both directions.

    host 0  eth0 ═══ host0  ┐
    host 1  eth0 ═══ host1  ├ switch: a namespace that forwards, through a relay where there is a delay
    host 2  eth0 ═══ host2  ┘

A cable is a pair of veth devices. Each end holds back what it sends by a token bucket (tc's tbf): the host's end what
the host sends, the switch's end what it receives. Addresses are private to the namespaces.
"""

from __future__ import annotations

import dataclasses
import subprocess
from collections.abc import Sequence

from box_limits import BoxError

INTERFACE = "eth0"
"""Of every host."""
RELAY = "delay"
"""The switch's TUN device, through which everything goes where there is a delay."""
_NETWORK = "10.77"
_MTU = 1500
_HEADERS = 52
"""Of IP and TCP, with time stamps, in every packet."""
_FRAME = 14
"""Of Ethernet, before every packet."""
_LARGEST = 65536
"""Bytes of a packet that the kernel has not cut yet: it is cut at the end of its way, or never."""
_CONGESTION_CONTROL = "cubic"
"""TCP's, as most hosts have it. This machine's own may be BBR, which takes a burst for the link's round trip."""
_BURST_S = 1e-3
_QUEUE_S = 0.1
_LEAST_QUEUE = 256 << 10
_TIMEOUT_S = 30


@dataclasses.dataclass(frozen=True)
class Shape:
    """One direction of a cable."""

    rate_bits_per_s: int
    """With headers."""
    burst_bytes: int
    """May go at once after a pause."""
    packet_bytes: int
    """The largest that a host hands over: no more than a burst, or the bucket would have to cut it."""
    queue_bytes: int


def shape(bandwidth_bits_per_s: float) -> Shape:
    """How to carry `bandwidth_bits_per_s` of a TCP stream's own bytes; headers come on top.

    A burst lasts a millisecond, or two packets where they take longer: with less, a timer that is late would cost
    bandwidth.
    """
    rate = bandwidth_bits_per_s * (_MTU + _FRAME) / (_MTU - _HEADERS)
    packet = int(min(_LARGEST, max(2 * _MTU, bandwidth_bits_per_s / 8 * _BURST_S)))
    # tbf counts the headers that each part of a large packet will have.
    parts = -(-packet // (_MTU - _HEADERS))
    burst = max(packet + parts * (_HEADERS + _FRAME), int(rate / 8 * _BURST_S))
    queue = max(_LEAST_QUEUE, 4 * burst, int(rate / 8 * _QUEUE_S))
    return Shape(round(rate), burst, packet, queue)


def address(host: int) -> str:
    return f"{_NETWORK}.{host + 1}.2"


def lay_cables(switch: int, hosts: Sequence[int], bandwidth_bits_per_s: float | None, delayed: bool) -> None:
    """Connect the network namespaces of these processes.

    Args:
        switch: the process whose namespace is the switch; it has made the device `RELAY` if `delayed`.
        hosts: a process of each host.
        bandwidth_bits_per_s: of each direction of each cable; None: no limit.

    Raises:
        BoxError: the kernel or a program cannot do it.
    """
    made = "" if bandwidth_bits_per_s is None else _bucket(shape(bandwidth_bits_per_s))
    at_switch, shaped = ["link set lo up"], []
    for host, process in enumerate(hosts):
        at_switch += [
            f"link add {INTERFACE} mtu {_MTU} netns {process} type veth peer name host{host} mtu {_MTU}",
            f"address add {_NETWORK}.{host + 1}.1/24 dev host{host}",
            f"link set host{host} up",
        ]
        if delayed:
            at_switch.append(f"rule add iif host{host} lookup 100")
        if made:
            shaped.append(f"qdisc add dev host{host} root {made}")
    if delayed:
        at_switch += [
            f"link set {RELAY} mtu {_MTU} txqueuelen 10000 up",
            f"route add default dev {RELAY} table 100",
        ]
    _configure(switch, "ip", at_switch)
    _configure(switch, "tc", shaped)
    forward = "for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >$f; done; echo 1 >/proc/sys/net/ipv4/ip_forward"
    _inside(switch, ["sh", "-c", forward])
    for host, process in enumerate(hosts):
        at_host = [
            "link set lo up",
            f"address add {address(host)}/24 dev {INTERFACE}",
            f"link set {INTERFACE} up",
            f"route add {_NETWORK}.0.0/16 via {_NETWORK}.{host + 1}.1 congctl {_CONGESTION_CONTROL}",
        ]
        if bandwidth_bits_per_s is not None:
            at_host.append(f"link set {INTERFACE} gso_max_size {shape(bandwidth_bits_per_s).packet_bytes}")
        _configure(process, "ip", at_host)
        if made:
            _configure(process, "tc", [f"qdisc add dev {INTERFACE} root {made}"])


def _bucket(shaped: Shape) -> str:
    return f"tbf rate {shaped.rate_bits_per_s}bit burst {shaped.burst_bytes} limit {shaped.queue_bytes}"


def _configure(process: int, program: str, lines: list[str]) -> None:
    """Lines for `ip` or `tc`, in the network namespace of a process."""
    if lines:
        _inside(process, [program, "-batch", "-"], "\n".join(lines) + "\n")


def _inside(process: int, command: list[str], text: str = "") -> None:
    done = subprocess.run(
        ["nsenter", f"--net=/proc/{process}/ns/net", *command],
        input=text,
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        said = done.stderr.strip() or done.stdout.strip()
        raise BoxError(
            f"`{' '.join(command[:2])}` failed: {said}",
            cause="the kernel lacks what was asked for: veth pairs, the token bucket filter (CONFIG_NET_SCH_TBF) "
            "where bandwidth is limited, policy routing (CONFIG_IP_MULTIPLE_TABLES) where there is a delay",
            next_step="load the kernel's module, leave out --bandwidth or --delay, or use another machine",
        )
