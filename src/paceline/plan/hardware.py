"""What was measured of machines without any job: devices, exchanges between workers, and both at once."""

from __future__ import annotations

from pydantic import Field

from paceline.plan.fits import Fit
from paceline.plan.links import MeasuredCollective
from paceline.records import Cluster, Record

HARDWARE_FILE = "hardware.json"


class DeviceSpeed(Record):
    """Of one worker with `threads` threads, beside `active - 1` others on its host: the mean over these."""

    threads: int = Field(ge=1)
    active: int = Field(ge=1)
    product_flops_per_s: float = Field(gt=0)
    """Of a product of two large square matrices in float32."""
    add_bytes_per_s: float = Field(gt=0)
    """Read and written by an addition in place of tensors that no cache holds: three times the bytes of one."""
    copy_bytes_per_s: float = Field(gt=0)
    """The same of a copy: twice the bytes."""


class Exchanges(Record):
    """Collectives among some workers, against the bytes of the message."""

    place: str
    """Where the workers are: `one host`, `one of each host` or `all hosts`."""
    workers: int = Field(ge=2)
    transport: str
    measured: tuple[MeasuredCollective, ...]
    fits: dict[str, Fit]
    """Latency and bandwidth, by kind."""
    overlaps: tuple[Overlap, ...] = ()


class Overlap(Record):
    """An all-reduce that is begun, and products of matrices while it is under way, on all workers at once."""

    num_bytes: int = Field(gt=0)
    computing_s: float = Field(gt=0)
    """The products alone."""
    exchanging_s: float = Field(gt=0)
    """The all-reduce alone."""
    both_s: float = Field(gt=0)

    @property
    def hidden(self) -> float:
        """Share of the all-reduce that costs nothing; negative where both together take longer than one by one."""
        return (self.computing_s + self.exchanging_s - self.both_s) / self.exchanging_s


class Hardware(Record):
    """All hosts of a launch, and what connects their workers."""

    cluster: Cluster
    devices: tuple[tuple[DeviceSpeed, ...], ...]
    """Of each host."""
    exchanges: tuple[Exchanges, ...]
    versions: dict[str, str]


Exchanges.model_rebuild()
