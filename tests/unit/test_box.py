"""The arithmetic of a cluster in a box, and what is said where one cannot be: no root, no namespaces needed."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import box_namespaces
from box import Box, BoxHost
from box_limits import BoxError, ControlGroup, find_hierarchy, is_left_over, new_name, share_out
from box_network import shape
from box_options import parse

_V1 = """\
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
"""
_V2 = "30 23 0:26 / /sys/fs/cgroup rw,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate\n"


def test_groups_of_version_1_are_made_below_this_processs_own():
    found = find_hierarchy(_V1, "4:memory:/session/7\n1:cpu,cpuacct:/\n0::/\n")
    assert found.version == 1
    assert found.parents == {
        "cpu": Path("/sys/fs/cgroup/cpu,cpuacct"),
        "memory": Path("/sys/fs/cgroup/memory/session/7"),
    }


def test_a_container_that_sees_only_its_own_group_makes_them_at_the_top_of_what_it_sees():
    inner = _V1.replace("0:32 / ", "0:32 /docker/abc ")
    found = find_hierarchy(inner, "4:memory:/docker/abc\n1:cpu,cpuacct:/\n")
    assert found.parents["memory"] == Path("/sys/fs/cgroup/memory")
    assert find_hierarchy(inner, "4:memory:/\n1:cpu,cpuacct:/\n").parents["memory"] == Path(
        "/sys/fs/cgroup/memory"
    )


def test_groups_of_version_2_are_made_at_the_top():
    found = find_hierarchy(_V2, "0::/user.slice/session-1.scope\n")
    assert (found.version, set(found.parents.values())) == (2, {Path("/sys/fs/cgroup")})


def test_a_controller_that_is_missing_is_named():
    with pytest.raises(BoxError, match="no control group for: cpu\nLikely cause"):
        find_hierarchy(_V1.splitlines()[1], "4:memory:/\n")


def test_limits_of_version_2(tmp_path):
    found = find_hierarchy(_V2.replace("/sys/fs/cgroup", str(tmp_path)), "0::/\n")
    group = ControlGroup(found, "a-box")
    group.make(0.25, 1 << 30)
    (directory,) = group.directories
    told = {path.name: path.read_text() for path in directory.iterdir()}
    assert told == {"cpu.max": "4000 16000", "cpu.weight": "1600", "memory.max": "1073741824"}
    assert (tmp_path / "cgroup.subtree_control").read_text() == "+cpu +memory"
    (directory / "memory.events").write_text("low 0\noom 3\noom_kill 2\n")
    assert group.num_killed_for_memory() == 2


@pytest.mark.parametrize(("cores", "told"), [(0.02, "4000 200000"), (0.5, "5000 10000"), (2, "20000 10000")])
def test_a_quota_of_less_than_the_kernel_counts_in_lengthens_the_period(tmp_path, cores, told):
    group = ControlGroup(find_hierarchy(_V2.replace("/sys/fs/cgroup", str(tmp_path)), "0::/\n"), "a-box")
    group.make(cores, None)
    assert (group.directories[0] / "cpu.max").read_text() == told


def test_a_box_is_left_over_when_its_maker_is_dead():
    name = new_name()
    assert not is_left_over(f"{name}-host0")
    maker, started = name.removeprefix("paceline-box-").split("-")[:2]
    assert is_left_over(f"paceline-box-{maker}-{int(started) + 1}-0-host0"), "the number was given away again"
    with subprocess.Popen(["true"]) as ended:
        ended.wait()
    assert is_left_over(f"paceline-box-{ended.pid}-1-0-host0")
    assert not is_left_over("somebody-elses")
    assert not is_left_over("paceline-box-mine")


def test_cpus_go_to_the_hosts_that_need_them_and_no_more_than_there_are():
    assert share_out([0.9, 0.9], [0, 1]) == [[0], [1]]
    assert share_out([0.45] * 4, [0, 1]) == [[0], [1], [0], [1]]
    assert share_out([1.5, 0.25, 0.25], [4, 5]) == [[4, 5], [4], [5]]
    assert share_out([None, 0.5], [0, 1]) == [[0, 1], [0]]
    with pytest.raises(
        BoxError, match=r"host 2 of 3 with 0\.6 cores cannot be placed: together they have 1\.8"
    ):
        share_out([0.6] * 3, [0, 1])
    with pytest.raises(BoxError, match="host 0 of 1 with 3 cores"):
        share_out([3.0], [0, 1])


def test_headers_come_on_top_of_a_bandwidth_and_a_burst_lasts_a_millisecond():
    of = shape(100e6)
    assert of.rate_bits_per_s == round(100e6 * 1514 / 1448)
    assert of.packet_bytes == 12500
    assert of.packet_bytes + 9 * 66 <= of.burst_bytes < 1.1 * of.packet_bytes
    slow, fast = shape(1e6), shape(10e9)
    assert slow.packet_bytes == 3000
    assert fast.packet_bytes == 65536
    assert fast.burst_bytes == int(10e9 * 1514 / 1448 / 8 * 1e-3)
    for shaped in (of, slow, fast):
        assert shaped.queue_bytes >= 4 * shaped.burst_bytes


def test_options():
    of_box = [
        "--hosts",
        "2",
        "--cores",
        "0.5,1",
        "--memory",
        "2G",
        "--bandwidth",
        "100mbit",
        "--delay",
        "500us",
    ]
    given = parse("", [*of_box, "--", "paceline", "plan", "--number=3"])
    assert given.hosts == [(0.5, 2 << 30, 1), (1.0, 2 << 30, 1)]
    assert (given.bandwidth_bits_per_s, given.delay_s) == (100e6, 500e-6)
    assert given.command == ["paceline", "plan", "--number=3"]
    assert not parse("", ["--check"]).asks_for_a_box
    assert parse("", ["--check", "--delay", "1ms"]).asks_for_a_box


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (["--bandwidth", "100", "--check"], "'100' is not like 100mbit, 1gbit or unlimited"),
        (["--delay", "1", "--check"], "'1' is not like 1ms, 500us or 0"),
        (["--hosts", "3", "--cores", "1,1", "--check"], "'1,1' is for 2 hosts, and there are 3"),
        ([], "give -- and a command"),
    ],
)
def test_wrong_options_are_said(wrong, words, capsys):
    with pytest.raises(SystemExit):
        parse("", wrong)
    assert words in capsys.readouterr().err


def test_what_no_box_can_be_is_said():
    with pytest.raises(BoxError, match="a box of 9 hosts"):
        Box([BoxHost()] * 9)
    with pytest.raises(BoxError, match="a bandwidth of 1000 bit/s"):
        Box([BoxHost()], bandwidth_bits_per_s=1000)
    with pytest.raises(BoxError, match="a host with 0 cores"):
        BoxHost(cores=0.0)


def test_without_root_or_programs_a_box_says_so(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(BoxError, match="a box needs root"), Box([BoxHost()]):
        pass
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setattr(box_namespaces.shutil, "which", lambda name: None if name == "tc" else name)
    with pytest.raises(BoxError, match="a box needs the programs tc, which are not here"), Box([BoxHost()]):
        pass
