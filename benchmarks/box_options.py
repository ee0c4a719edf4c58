"""The command line of box.py."""

from __future__ import annotations

import argparse
import dataclasses
import re
from collections.abc import Sequence

_SECONDS = {"s": 1.0, "ms": 1e-3, "us": 1e-6}
_BITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
_OF_A_BOX = ("hosts", "cores", "memory", "workers", "bandwidth", "delay")
_BYTES = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30}


@dataclasses.dataclass(frozen=True)
class Options:
    """What was asked for."""

    hosts: list[tuple[float | None, int | None, int]]
    """Of each its cores, its memory in bytes, its workers."""
    bandwidth_bits_per_s: float | None
    delay_s: float
    timeout_s: float
    command: list[str]
    check: bool
    asks_for_a_box: bool
    """Anything of hosts or links was given."""
    clean: bool


def bandwidth(text: str) -> float | None:
    """`100mbit`: bits per second; None for `unlimited`."""
    return None if text == "unlimited" else _quantity(text, _BITS, "100mbit, 1gbit or unlimited")


def seconds(text: str) -> float:
    """`1ms`; a bare 0 needs no unit."""
    return 0.0 if text == "0" else _quantity(text, _SECONDS, "1ms, 500us or 0")


def memory(text: str) -> int | None:
    """`2G`: bytes; None for `unlimited`."""
    return None if text == "unlimited" else int(_quantity(text, _BYTES, "2G, 500M or unlimited"))


def cores(text: str) -> float | None:
    return None if text == "unlimited" else _quantity(text, {"": 1.0}, "0.5, 2 or unlimited")


def workers(text: str) -> int:
    return int(_quantity(text, {"": 1.0}, "1 or 2"))


def _quantity(text: str, units: dict[str, float] | dict[str, int], examples: str) -> float:
    found = re.fullmatch(r"(\d+(?:\.\d*)?)([A-Za-z]*)", text)
    if found is None or found[2] not in units:
        raise argparse.ArgumentTypeError(f"{text!r} is not like {examples}")
    return float(found[1]) * units[found[2]]


def parse(description: str, arguments: Sequence[str] | None = None) -> Options:
    """From the command line; wrong options end the program with a word."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hosts", type=int, default=2, help="1 to 8 (default 2)")
    each = "one for all hosts, or one for each, with commas"
    parser.add_argument("--cores", default="unlimited", help=f"such as 0.5; {each}")
    parser.add_argument("--memory", default="unlimited", help=f"such as 2G; {each}")
    parser.add_argument("--workers", default="1", help=f"processes of the command on a host; {each}")
    parser.add_argument("--bandwidth", type=bandwidth, help="of each host and direction, such as 100mbit")
    parser.add_argument(
        "--delay", type=seconds, default=0.0, help="from host to host, such as 1ms; a round trip has two"
    )
    parser.add_argument("--timeout", type=seconds, default=3600.0, help="of the command, such as 600s")
    parser.add_argument(
        "--check", action="store_true", help="measure what was asked for (without more: of some boxes)"
    )
    parser.add_argument("--clean", action="store_true", help="remove what is left of boxes")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="-- and what torchrun is to start")
    given = parser.parse_args(arguments)
    command = given.command[1:] if given.command[:1] == ["--"] else given.command
    if not (command or given.check or given.clean):
        parser.error("give -- and a command, or --check, or --clean")
    try:
        limits = [
            [of(text) for text in _for_each(texts, given.hosts)]
            for texts, of in ((given.cores, cores), (given.memory, memory), (given.workers, workers))
        ]
    except argparse.ArgumentTypeError as error:
        parser.error(str(error))
    return Options(
        hosts=list(zip(*limits, strict=True)),
        bandwidth_bits_per_s=given.bandwidth,
        delay_s=given.delay,
        timeout_s=given.timeout,
        command=command,
        check=given.check,
        asks_for_a_box=any(getattr(given, name) != parser.get_default(name) for name in _OF_A_BOX),
        clean=given.clean,
    )


def _for_each(texts: str, hosts: int) -> list[str]:
    found = texts.split(",")
    if len(found) == 1:
        return found * hosts
    if len(found) != hosts:
        raise argparse.ArgumentTypeError(f"{texts!r} is for {len(found)} hosts, and there are {hosts}")
    return found
