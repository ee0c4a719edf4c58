"""Devices and interconnects by name, with the numbers that their makers give.

Nothing here was measured on what is planned for, and a plan that uses it says so. Peaks are of dense products of
matrices with sums in float32; bandwidths of links are those of one direction.
"""

from __future__ import annotations

from pydantic import Field

from paceline.plan.links import Link
from paceline.plan.updates import SHARED_MEMORY
from paceline.records import Record

PRECISIONS = ("bf16", "fp16", "fp32")
_SHEET = "from a datasheet, not measured"


class Device(Record):
    """What computes: one GPU."""

    name: str
    memory_bytes: int = Field(gt=0)
    flops_per_s: dict[str, float] = {}
    """By precision; empty: not known."""
    memory_bytes_per_s: float | None = Field(default=None, gt=0)
    source: str
    """Where the numbers come from, as a plan says it."""

    @property
    def best_precision(self) -> str | None:
        """What paceline trains in here: bf16 where the device has it, else fp32."""
        return next((p for p in ("bf16", "fp32", "fp16") if p in self.flops_per_s), None)


class Interconnect(Record):
    """A kind of link."""

    link: Link
    source: str
    """Where the numbers come from, as a plan says it."""


def _device(
    name: str, gib: float, bf16: float | None, fp16: float, fp32: float, gb_per_s: float, source: str
) -> Device:
    """Peaks in TFLOP/s."""
    peaks = {"bf16": bf16, "fp16": fp16, "fp32": fp32}
    return Device(
        name=name,
        memory_bytes=int(gib * 2**30),
        flops_per_s={precision: peak * 1e12 for precision, peak in peaks.items() if peak is not None},
        memory_bytes_per_s=gb_per_s * 1e9,
        source=f"{_SHEET} ({source})",
    )


DEVICES: dict[str, Device] = {
    "t4": _device("T4", 16, None, 65, 8.1, 300, "NVIDIA T4 (2019)"),
    "v100-16gb": _device("V100 SXM2 16 GB", 16, None, 125, 15.7, 900, "NVIDIA V100 (2020)"),
    "v100-32gb": _device("V100 SXM2 32 GB", 32, None, 125, 15.7, 900, "NVIDIA V100 (2020)"),
    "a10": _device("A10", 24, 125, 125, 31.2, 600, "NVIDIA A10 (2021)"),
    "a100-40gb": _device("A100 SXM4 40 GB", 40, 312, 312, 19.5, 1555, "NVIDIA A100 (2021)"),
    "a100-80gb": _device("A100 SXM4 80 GB", 80, 312, 312, 19.5, 2039, "NVIDIA A100 (2021)"),
    "h100-pcie": _device(
        "H100 PCIe 80 GB", 80, 756, 756, 51, 2000, "NVIDIA H100 (2022), sparse peaks halved"
    ),
    "h100": _device("H100 SXM5 80 GB", 80, 989, 989, 67, 3350, "NVIDIA H100 (2022), sparse peaks halved"),
    "h200": _device("H200 SXM 141 GB", 141, 989, 989, 67, 4800, "NVIDIA H200 (2024), sparse peaks halved"),
    "b200": _device(
        "B200 SXM 180 GB", 180, 2250, 2250, 75, 8000, "NVIDIA HGX B200 (2025), sparse peaks halved"
    ),
    "l4": _device("L4", 24, 121, 121, 30.3, 300, "NVIDIA L4 (2023), sparse peaks halved"),
    "l40s": _device("L40S", 48, 362, 362, 91.6, 864, "NVIDIA L40S (2023)"),
    "rtx-3090": _device("GeForce RTX 3090", 24, 71, 71, 35.6, 936, "NVIDIA GA102 (2020)"),
    "rtx-4090": _device("GeForce RTX 4090", 24, 165.2, 165.2, 82.6, 1008, "NVIDIA Ada GPUs (2022)"),
    "mi300x": _device("AMD Instinct MI300X", 192, 1307.4, 1307.4, 163.4, 5300, "AMD MI300X (2023)"),
}

_NCCL = "latency from NCCL's table for rings"
_BOX = "as measured between 2 workers on a machine with 2 cores, not here"


def _link(
    name: str, bytes_per_s: float, latency_us: float, source: str, *, is_shared: bool = False
) -> Interconnect:
    link = Link(name=name, latency_s=latency_us * 1e-6, bytes_per_s=bytes_per_s, is_shared=is_shared)
    return Interconnect(link=link, source=source)


def _nvlink(generation: int, gb_per_s: float, device: str) -> Interconnect:
    source = f"{_SHEET} (NVIDIA {device}, one direction; {_NCCL})"
    return _link(f"NVLink {generation}", gb_per_s * 1e9, 3.4, source)


def _pcie(generation: int, gb_per_s: float) -> Interconnect:
    source = f"{_SHEET} (the standard's 16 lanes, one direction; {_NCCL})"
    return _link(f"PCIe {generation}", gb_per_s * 1e9, 5.7, source)


def _ethernet(gbit_per_s: float, latency_us: float) -> Interconnect:
    source = f"{_SHEET} (the standard's line rate; latency as is usual with TCP)"
    return _link(f"{gbit_per_s:g} Gbit/s Ethernet", gbit_per_s * 1e9 / 8, latency_us, source)


def _infiniband(name: str, gbit_per_s: float) -> Interconnect:
    source = f"{_SHEET} (NVIDIA ConnectX, 4 lanes, one direction; {_NCCL})"
    return _link(f"InfiniBand {name}", gbit_per_s * 1e9 / 8, 9.6, source)


INTERCONNECTS: dict[str, Interconnect] = {
    "nvlink2": _nvlink(2, 150, "V100"),
    "nvlink3": _nvlink(3, 300, "A100"),
    "nvlink4": _nvlink(4, 450, "H100"),
    "nvlink5": _nvlink(5, 900, "HGX B200"),
    "pcie3": _pcie(3, 15.75),
    "pcie4": _pcie(4, 31.5),
    "pcie5": _pcie(5, 63.0),
    "ethernet-1g": _ethernet(1, 100),
    "ethernet-10g": _ethernet(10, 50),
    "ethernet-25g": _ethernet(25, 30),
    "ethernet-100g": _ethernet(100, 20),
    "infiniband-edr": _infiniband("EDR", 100),
    "infiniband-hdr": _infiniband("HDR", 200),
    "infiniband-ndr": _infiniband("NDR", 400),
    "shared-memory": _link(SHARED_MEMORY, 4e9, 40, _BOX, is_shared=True),
    "loopback": _link("gloo", 1.7e9, 950, _BOX, is_shared=True),
}
