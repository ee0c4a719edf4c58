"""Clusters described in a file: what is read, and what is said of each kind of mistake."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from paceline.errors import ClusterError
from paceline.plan.described import EFFICIENCY, DescribedCluster, read_cluster
from paceline.plan.presets import DEVICES, INTERCONNECTS
from paceline.plan.units import read_quantity

EXAMPLES = sorted((Path(__file__).parents[2] / "examples/clusters").glob("*.toml"))
HOST = '[[hosts]]\nname = "a"\ncores = 4\nmemory = "8 GiB"\n'
GPUS = '[[hosts]]\nname = "a"\nworkers = 8\ndevice = "h100"\n'


@pytest.fixture
def read(tmp_path):
    def reader(text: str) -> DescribedCluster:
        file = tmp_path / "cluster.toml"
        file.write_text(text)
        return read_cluster(file)

    return reader


def test_a_host_of_cores_needs_only_their_number_and_its_memory(read):
    (host,) = read(HOST).hosts
    assert (host.name, host.workers, host.cores, host.memory_bytes) == ("a", 4, 4, 8 << 30)
    assert host.device is None
    assert host.speed is None
    assert host.within is None


def test_gpus_bring_their_memory_and_precision(read):
    cluster = read('between = "infiniband-ndr"\nwithin = "nvlink4"\n' + GPUS + "count = 3\n")
    assert [host.name for host in cluster.hosts] == ["a0", "a1", "a2"]
    first = cluster.hosts[0]
    assert first.device == DEVICES["h100"]
    assert first.memory_bytes == 8 * 80 * 2**30
    assert (first.precision, first.efficiency) == ("bf16", EFFICIENCY)
    assert first.within == INTERCONNECTS["nvlink4"].link
    assert first.between is not None
    assert first.between.bytes_per_s == 50e9
    assert all("from a datasheet, not measured" in source for source in cluster.sources)
    assert len(cluster.sources) == 3


def test_a_device_without_bf16_computes_in_fp32(read):
    assert read('within = "nvlink2"\n' + GPUS.replace("h100", "v100-32gb")).hosts[0].precision == "fp32"


def test_own_devices_and_links_and_what_a_host_has_of_its_own(read):
    cluster = read(
        """
        name = "mine"
        between = { link = "ethernet-10g", latency = "80 us", cables = 2 }
        [links.ring]
        bandwidth = "200 Gbit/s"
        latency = "2 us"
        shared = true
        [devices.chip]
        memory = "32 GB"
        bf16 = "90 TFLOP/s"
        [[hosts]]
        name = "x"
        workers = 2
        device = "chip"
        within = "ring"
        [[hosts]]
        name = "y"
        workers = 2
        device = "chip"
        speed = 3
        within = { bandwidth = "1 GB/s", latency = "0 s" }
        between = "ethernet-1g"
        """
    )
    x, y = cluster.hosts
    assert x.within is not None
    assert y.within is not None
    assert x.between is not None
    assert y.between is not None
    assert (x.within.name, x.within.bytes_per_s, x.within.is_shared) == ("ring", 25e9, True)
    assert (y.within.bytes_per_s, y.within.latency_s) == (1e9, 0.0)
    assert x.between.latency_s == pytest.approx(80e-6)
    assert (x.between.bytes_per_s, x.between.cables) == (1.25e9, 2)
    assert y.between == INTERCONNECTS["ethernet-1g"].link
    assert x.device is not None
    assert x.device.memory_bytes == 32_000_000_000
    assert (x.device.flops_per_s, x.device.memory_bytes_per_s) == ({"bf16": 9e13}, None)
    assert (x.speed, y.speed) == (None, 3.0)
    told = "\n".join(cluster.sources)
    assert "chip: 29.8023 GiB, 90 TFLOP/s bf16: as cluster.toml says, not measured" in told
    assert "latency as cluster.toml says, not measured; the rest from a datasheet" in told


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("name = 'x\n", "is no valid TOML: .*line 1"),
        ("a = 1\nb = [1,\n", r"is no valid TOML: .*\(at line 2, the end of the file\)"),
        ("a = 1\nb = = 2\nc = 3\n", "is no valid TOML: .*line 2, column 5"),
        ("", "there are no hosts"),
        ("hosts = []", "there are no hosts"),
        ("hosts = [1]", r"hosts\[0\] is 1"),
        ("[[host]]\nname = 'a'", "host is no key\nLikely cause: perhaps 'hosts' was meant"),
        (HOST + "core = 2", r"hosts\[0\].core is no key\nLikely cause: perhaps 'cores'"),
        (HOST.replace("cores = 4\n", ""), r"hosts\[0\].cores is missing"),
        (HOST.replace("memory", "#"), r"hosts\[0\].memory is missing"),
        (HOST.replace('name = "a"\n', ""), r"hosts\[0\].name is missing"),
        (HOST.replace("= 4", "= 0"), "cores is 0\nNext step: give a whole number of at least 1"),
        (HOST.replace("= 4", "= 4.5"), r"cores is 4\.5"),
        (HOST.replace("= 4", "= true"), "cores is True"),
        (HOST + "count = 0", "count is 0"),
        (HOST + "workers = 5", "5 workers on 4 cores"),
        (HOST + "speed = 0", "speed is 0\nNext step: give a number above 0"),
        (HOST + "speed = -1.5", r"speed is -1\.5"),
        (HOST + "speed = inf", "speed is inf"),
        (HOST + "speed = 'fast'", "speed is 'fast'"),
        (HOST + "efficiency = 0.5", "efficiency is given, and its device is 'cpu'"),
        (HOST.replace("8 GiB", "0 GiB"), "memory is '0 GiB'\nNext step: give more than nothing"),
        (HOST.replace("8 GiB", "8"), "memory: '8' is no number with a unit"),
        (HOST.replace("8 GiB", "8 Gbit/s"), "'8 Gbit/s' has the unit 'Gbit/s', which is none of bytes"),
        (HOST.replace('"8 GiB"', "8"), "memory: 8 is no text with a unit"),
        (HOST + "count = 2", "there are 2 hosts, and no link between them .host 'a0'."),
        (HOST + HOST, "two hosts have the name 'a'"),
        ("between = 'ethernet-2g'\n" + HOST, "between: there is no link 'ethernet-2g'\n.*perhaps 'ethernet-"),
        ("between = 7\n" + HOST, "between is 7"),
        ("between = { latency = '1 us' }\n" + HOST, r"between\.bandwidth is missing"),
        ("between = { link = 'ethernet-1g', bandwidth = '0 bit/s' }\n" + HOST, "bandwidth is '0 bit/s'"),
        ("between = { link = 'ethernet-1g', cables = 0 }\n" + HOST, "cables is 0"),
        ("between = { link = 'ethernet-1g', speed = 2 }\n" + HOST, r"between\.speed is no key"),
        ("within = 'nvlink4'\n" + GPUS.replace("h100", "h10"), "no device 'h10'\nLikely cause: perhaps 'h100"),
        ("within = 'nvlink4'\n" + GPUS.replace("h100", "a100"), "perhaps 'a100-40gb' or 'a100-80gb'"),
        (GPUS, "has 8 GPUs, and no link within the host"),
        ("within = 'measured'\n" + GPUS, "no link 'measured'"),
        ("within = 'nvlink4'\n" + GPUS.replace("workers = 8\n", ""), r"hosts\[0\].workers is missing"),
        ("within = 'nvlink4'\n" + GPUS + "memory = '1 TiB'", "memory is given, and its device is H100"),
        ("within = 'nvlink4'\n" + GPUS + "precision = 'fp8'", "precision is 'fp8'.*\n.*no peak for it\n.*bf16 or fp16"),
        ("within = 'nvlink2'\n" + GPUS.replace("h100", "v100-16gb") + "precision = 'bf16'", "precision is 'bf16'"),
        ("within = 'nvlink4'\n" + GPUS + "efficiency = 1.2", "is 1.2\nNext step: give a number above 0, and at"),
        ("within = 'nvlink4'\nbetween = 'ethernet-1g'\n" + GPUS + HOST.replace('"a"', '"b"'), "some hosts have GPUs"),
        ("[devices.x]\nbf16 = '1 TFLOP/s'\n" + HOST, r"devices\.x\.memory is missing"),
        ("[devices.x]\nmemory = '1 GiB'\nfp8 = '1 TFLOP/s'\n" + HOST, r"devices\.x\.fp8 is no key"),
        ("devices = 3\n" + HOST, "devices is 3"),
        (
            "[devices.x]\nmemory = '1 GiB'\n[[hosts]]\nname = 'a'\nworkers = 1\ndevice = 'x'",
            "how fast x is cannot be told",
        ),
        ("[links.x]\nlink = 'nvlink4'\n" + HOST, r"links\.x\.link is no key"),
    ],
)  # fmt: skip
def test_each_mistake_is_named_with_its_place(read, text, words):
    with pytest.raises(ClusterError, match="(?s)" + words) as caught:
        read(text)
    assert "cluster.toml" in str(caught.value)
    assert caught.value.next_step


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(ClusterError, match="cannot be read: No such file"):
        read_cluster(tmp_path / "none.toml")


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda file: file.stem)
def test_the_examples_are_right(file):
    assert sum(host.workers for host in read_cluster(file).hosts) in (8, 24, 64)


def test_the_documentation_names_every_preset():
    text = (Path(__file__).parents[2] / "docs/clusters.md").read_text()
    assert [name for name in [*DEVICES, *INTERCONNECTS] if not re.search(rf"`{name}`", text)] == []


@pytest.mark.parametrize(
    ("text", "what", "value"),
    [
        ("24 GiB", "bytes", 24 * 2**30),
        ("1.5GB", "bytes", 1.5e9),
        ("100 Gbit/s", "bytes per second", 12.5e9),
        ("2_000 MB/s", "bytes per second", 2e9),
        ("5 us", "seconds", 5e-6),
        ("5 µs", "seconds", 5e-6),
        ("1e3 TFLOP/s", "operations per second", 1e15),
    ],
)
def test_quantities(text, what, value):
    assert read_quantity(text, what) == pytest.approx(value)
