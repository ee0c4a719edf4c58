"""What `paceline measure` prints."""

from __future__ import annotations

import io

import pytest
from planning_examples import linked, profile
from rich.console import Console

from paceline.plan.curves import Curve
from paceline.plan.fits import fit
from paceline.plan.hardware import DeviceSpeed, Exchanges, Hardware, Overlap
from paceline.plan.links import KINDS, MeasuredCollective
from paceline.plan.profile import Tried
from paceline.records import Layout
from paceline.report.hardware_text import print_hardware
from paceline.report.profile_text import print_profile

CURVE = Curve(points=((4.0, 1e-5), (4096.0, 1.4e-5), (1 << 20, 1e-3)))
SHORT = Curve(points=((4.0, 2e-5), (4096.0, 3e-5)))


def printed(show, *what, width: int = 80) -> str:
    stream = io.StringIO()
    show(Console(file=stream, width=width), *what)
    return stream.getvalue()


def collective(kind: str, curve: Curve = CURVE) -> MeasuredCollective:
    return MeasuredCollective(kind=kind, workers=2, seconds=curve)


@pytest.fixture
def hardware() -> Hardware:
    measured = tuple(collective(kind, SHORT if kind == "message" else CURVE) for kind in KINDS)
    exchanges = Exchanges(
        place="one host",
        workers=2,
        transport="shared memory",
        measured=measured,
        fits={one.kind: fit(one.seconds.points) for one in measured},
        overlaps=(
            Overlap(num_bytes=1 << 20, computing_s=2e-3, exchanging_s=1e-3, both_s=2.5e-3),
            Overlap(num_bytes=1 << 24, computing_s=2e-3, exchanging_s=1e-3, both_s=3.2e-3),
        ),
    )
    speed = DeviceSpeed(
        threads=1, active=2, product_flops_per_s=3e10, add_bytes_per_s=9e9, copy_bytes_per_s=8e9
    )
    return Hardware(
        cluster=linked(1, 2).cluster, devices=((speed,),), exchanges=(exchanges,), versions={"torch": "2"}
    )


def test_a_machines_tables_have_all_of_it(hardware):
    text = printed(print_hardware, hardware)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "2 workers × 1 thread 30 9 8" in rows
    assert "4 bytes 10 µs 10 µs 10 µs 10 µs 10 µs 20 µs" in rows
    # The largest message would have taken too long.
    assert "1 MiB 1 ms 1 ms 1 ms 1 ms 1 ms –" in rows
    assert any(row.startswith("send/receive 4 KiB") for row in rows)
    assert "2, shared memory 1 MiB 2 ms 1 ms 2.5 ms 50 %" in rows
    assert "2, shared memory 16 MiB 2 ms 1 ms 3.2 ms −20 %" in rows


def test_the_record_is_read_again(hardware):
    assert Hardware.from_json(hardware.to_json()) == hardware


def test_a_jobs_tables_have_all_of_it():
    link = linked(1, 2).within.model_copy(update={"measured": (collective("all-reduce"),)})
    there = linked(1, 2, within=link)
    job = profile((1.0, 1.0, 0.5)).model_copy(update={"tried": (Tried(layout=Layout(tp=2), step_s=0.0123),)})
    text = printed(print_profile, job, there)
    assert "…" not in text
    rows = [" ".join(line.split()) for line in text.splitlines()]
    assert "Forward / backward pass of a block, ms: 1 worker × 1 thread" in rows
    # 0.1 ms and 1 ms for a sample; a part of two takes 0.55 of that.
    assert "block1.0 2 0.1 / 0.2 1.1 / 2.2" in rows
    assert "tp=2 0.055 / 0.11 0.605 / 1.21" in rows
    assert "block1.0 38.1 MiB 38.1 MiB 76.3 MiB" in rows
    assert "block1.0 2.86 MiB 977 KiB 195 KiB 977 KiB 97.7 KiB" in rows
    assert "Within a host: 2 workers, shared memory" in rows
    assert "12.3 tp=2" in rows
