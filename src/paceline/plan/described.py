"""A cluster that is described in a TOML file, for plans without the hardware.

    name = "two laptops"
    between = "ethernet-1g"            # what connects the hosts: a preset, one of [links], or a table

    [[hosts]]
    name = "laptop"
    count = 2                          # so many alike
    cores = 8
    memory = "16 GiB"
    speed = 1.5                        # of a worker, relative to one on the machine that measures

docs/clusters.md explains each key.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

from pydantic import Field

from paceline.errors import ClusterError
from paceline.plan.links import Link
from paceline.plan.presets import DEVICES, INTERCONNECTS, PRECISIONS, Device
from paceline.plan.table import Table, nearest
from paceline.records import Record

EFFICIENCY = 0.7
"""Share of a datasheet's peaks that large operations reach, where the file says nothing."""
MEASURED = "measured"
"""Name of the link within a host that was measured on this machine."""
CPU = "cpu"

_TOP = ("name", "within", "between", "hosts", "devices", "links")
_HOST = (
    "name", "count", "workers", "device", "speed", "precision", "efficiency", "cores", "memory", "within", "between",
)  # fmt: skip
_DEVICE = ("memory", *PRECISIONS, "bandwidth")
_LINK = ("link", "bandwidth", "latency", "cables", "shared")
_WORDS = {"bytes_per_s": "bandwidth", "latency_s": "latency"}


class DescribedHost(Record):
    """One host, as its file has it."""

    name: str
    workers: int = Field(ge=1)
    cores: int = Field(ge=1)
    memory_bytes: int = Field(gt=0)
    """Of all its workers together."""
    device: Device | None
    """None: cores like those of the machine that measures."""
    speed: float | None
    """Of a worker, relative to one on that machine; None: by the device's datasheet, or as there."""
    precision: str
    """In which it computes; counts only where the speed follows from the datasheet."""
    efficiency: float
    """Share of the datasheet's peaks that is reached."""
    within: Link | None
    """None: as it was measured on that machine, or not needed."""
    between: Link | None


class DescribedCluster(Record):
    """All hosts of a file, in its order, which is that of the workers' ranks."""

    name: str
    hosts: tuple[DescribedHost, ...]
    sources: tuple[str, ...]
    """A line for each device and link: its numbers, and where they come from."""


def read_cluster(file: Path) -> DescribedCluster:
    """The cluster that a file describes.

    Raises:
        ClusterError: the file cannot be read, is no TOML, or does not describe a cluster; with the place.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ClusterError(
            f"the cluster's file {file} cannot be read: {reason}",
            next_step="check the path; docs/clusters.md and examples/clusters/ show what such a file looks like",
        ) from error
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        end = f"(at line {len(text.splitlines())}, the end of the file)"
        raise ClusterError(
            f"{file} is no valid TOML: {str(error).replace('(at end of document)', end)}",
            cause="a missing quote or bracket; texts and quantities stand in quotes",
            next_step="look at that line; examples/clusters/ has files to start from",
        ) from error
    return _Reader(file, values).read()


class _Reader:
    """Reads one file's values."""

    def __init__(self, file: Path, values: Mapping[str, Any]) -> None:
        self._file = file
        self._top = Table(values, file, "", _TOP)
        self._own = f"as {file.name} says, not measured"
        self._sources: dict[str, None] = {}
        self._devices = {name: self._read_device(name, one) for name, one in self._named("devices")}
        self._links = {name: self._read_own_link(name, one) for name, one in self._named("links")}

    def read(self) -> DescribedCluster:
        listed = self._top.raw("hosts")
        if not isinstance(listed, list) or not listed:
            self._top.fail(
                "there are no hosts", "", 'describe at least one: [[hosts]], name = "…", cores = …'
            )
        hosts: list[DescribedHost] = []
        for number, values in enumerate(listed):
            hosts += self._read_hosts(Table(values, self._file, f"hosts[{number}]", _HOST))
        self._check(hosts)
        return DescribedCluster(
            name=self._top.text("name", self._file.stem), hosts=tuple(hosts), sources=tuple(self._sources)
        )

    def _check(self, hosts: list[DescribedHost]) -> None:
        """What no host can know by itself."""
        names = [host.name for host in hosts]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            self._top.fail(
                f"two hosts have the name {twice!r}",
                "",
                "give each a name of its own, or one of them a count",
            )
        if len({host.device is None for host in hosts}) > 1:
            self._top.fail(
                "some hosts have GPUs, and others do not",
                "workers of one run are all on GPUs, or all on CPUs",
                "describe them in two files, and compare the plans",
            )
        alone = next((host for host in hosts if host.between is None), None)
        if len(hosts) > 1 and alone is not None:
            self._top.fail(
                f"there are {len(hosts)} hosts, and no link between them (host {alone.name!r})",
                "",
                f'add between = "ethernet-10g", or another of {", ".join(_between_hosts())}',
            )

    def _named(self, key: str) -> list[tuple[str, Any]]:
        """The entries of `[devices]` or `[links]`."""
        values = self._top.raw(key) if key in self._top else {}
        if not isinstance(values, dict):
            self._top.fail(f"{key} is {values!r}", "no table", f"write [{key}.NAME] above its keys")
        return list(values.items())

    def _read_device(self, name: str, values: object) -> Device:
        table = Table(values, self._file, f"devices.{name}", _DEVICE)
        given = [precision for precision in PRECISIONS if precision in table]
        return Device(
            name=name,
            memory_bytes=int(table.quantity("memory", "bytes")),
            flops_per_s={
                precision: table.quantity(precision, "operations per second") for precision in given
            },
            memory_bytes_per_s=table.quantity("bandwidth", "bytes per second")
            if "bandwidth" in table
            else None,
            source=self._own,
        )

    def _read_hosts(self, table: Table) -> list[DescribedHost]:
        name, count = table.text("name"), table.count("count", 1)
        device = self._device_of(table)
        cores = table.count("cores") if device is None else table.count("cores", 1)
        workers = table.count("workers", cores) if device is None else table.count("workers")
        if device is None and workers > cores:
            table.fail(
                f"{table.place}: {workers} workers on {cores} cores",
                "a worker on a CPU has at least one core",
                f"use workers = {cores}, or give the host more cores",
            )
        if device is None:
            memory_bytes = int(table.quantity("memory", "bytes"))
        elif "memory" in table:
            table.fail(
                f"{table.place}.memory is given, and its device is {device.name}",
                "workers on GPUs keep everything in the GPUs' memory",
                "leave it out, or describe the device in a table [devices.NAME]",
            )
        else:
            memory_bytes = device.memory_bytes * workers
        speed = table.factor("speed") if "speed" in table else None
        is_measured = device is None and self._raw_link(table, "within") == MEASURED
        within = None if is_measured else self._link_of(table, "within")
        if within is None and workers > 1 and device is not None:
            table.fail(
                f"{table.place} has {workers} GPUs, and no link within the host",
                "",
                f'add within = "nvlink4", or another of {", ".join(_within_hosts())}',
            )
        host = DescribedHost(
            name=name,
            workers=workers,
            cores=cores,
            memory_bytes=memory_bytes,
            device=device,
            speed=speed,
            precision=self._precision_of(table, device, speed),
            efficiency=table.factor("efficiency", EFFICIENCY, most=1.0),
            within=within,
            between=self._link_of(table, "between"),
        )
        names = [name] if count == 1 else [f"{name}{number}" for number in range(count)]
        return [host.model_copy(update={"name": one}) for one in names]

    def _device_of(self, table: Table) -> Device | None:
        name = table.text("device", CPU)
        if name == CPU:
            for key in ("precision", "efficiency"):
                if key in table:
                    table.fail(
                        f"{table.place}.{key} is given, and its device is {CPU!r}",
                        "cores have no datasheet here: they are as fast as those of this machine, times `speed`",
                        f"leave {key} out, and give a speed",
                    )
            return None
        known = {**DEVICES, **self._devices}
        if name not in known:
            self._fail_unknown(f"{table.place}.device", "device", name, [CPU, *known], "[devices.NAME]")
        device = known[name]
        self._sources[_describe_device(device)] = None
        return device

    def _precision_of(self, table: Table, device: Device | None, speed: float | None) -> str:
        if device is None:
            return "fp32"
        if speed is None and not device.flops_per_s:
            table.fail(
                f"{table.place}: how fast {device.name} is cannot be told",
                "its table has no bf16, fp16 or fp32, and the host no speed",
                'add bf16 = "… TFLOP/s" to the device, or speed = … to the host',
            )
        precision = table.text("precision", device.best_precision or "fp32")
        if precision not in PRECISIONS or (device.flops_per_s and precision not in device.flops_per_s):
            known = [p for p in PRECISIONS if p in device.flops_per_s] or list(PRECISIONS)
            table.fail(
                f"{table.place}.precision is {precision!r}",
                f"{device.name} has no peak for it",
                f"use {' or '.join(known)}",
            )
        return precision

    def _raw_link(self, host: Table, key: str) -> object:
        return (host if key in host else self._top).raw(key)

    def _link_of(self, host: Table, key: str) -> Link | None:
        """A host's link, else that of the whole file; None where there is none."""
        value = self._raw_link(host, key)
        if value is None:
            return None
        place = f"{host.place}.{key}" if key in host else key
        if isinstance(value, str):
            value = {"link": value}
        return self._read_link(value, place)

    def _read_link(self, values: object, place: str) -> Link:
        """A table with numbers of its own, or with the name of a preset or of one of `[links]` and what is other."""
        table = Table(values, self._file, place, _LINK)
        name = table.text("link") if "link" in table else ""
        if name in self._links:
            base, source = self._links[name], self._own
        elif name in INTERCONNECTS:
            base, source = INTERCONNECTS[name].link, INTERCONNECTS[name].source
        elif name:
            self._fail_unknown(place, "link", name, [*INTERCONNECTS, *self._links], "[links.NAME]")
        else:
            base, source = Link(name=place, **_numbers(table, all_of_them=True)), self._own
        given = _numbers(table, all_of_them=False)
        other = [word for key, word in _WORDS.items() if key in given]
        if other and source != self._own:
            source = f"{' and '.join(other)} {self._own}; the rest {source}"
        link = base.model_copy(update=given)
        self._sources[_describe_link(link, source)] = None
        return link

    def _read_own_link(self, name: str, values: object) -> Link:
        """An entry of `[links]`."""
        table = Table(values, self._file, f"links.{name}", _LINK[1:])
        return Link(name=name, **_numbers(table, all_of_them=True))

    def _fail_unknown(self, place: str, what: str, name: str, known: list[str], table: str) -> NoReturn:
        near = nearest(name, known)
        self._top.fail(
            f"{place}: there is no {what} {name!r}",
            f"perhaps {' or '.join(map(repr, near))} was meant" if near else "",
            f"use one of {', '.join(known)}; or describe your own in a table {table}",
        )


def _numbers(table: Table, *, all_of_them: bool) -> dict[str, Any]:
    """What a table of a link gives; its bandwidth and its latency must be there if `all_of_them`."""
    given: dict[str, Any] = {}
    if all_of_them or "bandwidth" in table:
        given["bytes_per_s"] = table.quantity("bandwidth", "bytes per second")
    if all_of_them or "latency" in table:
        given["latency_s"] = table.quantity("latency", "seconds", least=0.0)
    if "shared" in table:
        given["is_shared"] = table.flag("shared")
    if "cables" in table:
        given["cables"] = table.count("cables")
    return given


def _between_hosts() -> list[str]:
    return [name for name in INTERCONNECTS if name.startswith(("ethernet", "infiniband"))]


def _within_hosts() -> list[str]:
    return [name for name in INTERCONNECTS if name.startswith(("nvlink", "pcie"))]


def _describe_device(device: Device) -> str:
    peaks = [f"{peak / 1e12:g} TFLOP/s {precision}" for precision, peak in device.flops_per_s.items()]
    bandwidth = device.memory_bytes_per_s
    memory = [f"{bandwidth / 1e9:,g} GB/s"] if bandwidth else []
    numbers = ", ".join([f"{device.memory_bytes / 2**30:g} GiB", *peaks, *memory])
    return f"{device.name}: {numbers}: {device.source}"


def _describe_link(link: Link, source: str) -> str:
    cables = f" × {link.cables} cables" if link.cables > 1 else ""
    bandwidth = f"{link.bytes_per_s / 1e9:g} GB/s{cables}"
    return f"{link.name}: {bandwidth}, {link.latency_s * 1e6:g} µs a message: {source}"
