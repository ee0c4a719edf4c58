"""A cluster in a box (benchmarks/box.py): it is what was asked for, paceline trains and plans on it, nothing stays."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median

import pytest
from command import ENVIRONMENT, TOY, of_kind, read_events

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

from box import Box, BoxHost
from box_check import check_cores, check_links, check_memory
from box_limits import BoxError, kill_all, new_name, this_hierarchy
from box_namespaces import require_root
from box_processes import require_success

from paceline.plan.profile import LinkedCluster

pytestmark = pytest.mark.netns
_BITS_PER_S = 100e6


@pytest.fixture(scope="module", autouse=True)
def a_machine_for_it() -> None:
    try:
        require_root(delayed=True)
        this_hierarchy()
    except BoxError as error:
        pytest.skip(f"NO CLUSTER IN A BOX HERE: {error}")
    made = subprocess.run(["unshare", "--net", "--mount", "--pid", "--fork", "true"], capture_output=True, text=True)
    if made.returncode:
        pytest.skip(f"NO CLUSTER IN A BOX HERE: {made.stderr}")


@pytest.fixture(scope="module")
def pair() -> Iterator[Box]:
    # With a share of their own, hosts are not slowed down by what else runs on the machine.
    with Box([BoxHost(cores=0.95)] * 2, bandwidth_bits_per_s=_BITS_PER_S) as box:
        yield box


def wait_for(what: Callable[[], bool], patience_s: float = 10.0) -> bool:
    end_s = time.monotonic() + patience_s
    while not what():
        if time.monotonic() > end_s:
            return False
        time.sleep(0.05)
    return True


def left_over() -> list[Path]:
    return [path for mount in this_hierarchy().mounts for path in mount.rglob("paceline-box-*") if path.is_dir()]


def test_nothing_is_faster_or_larger_than_was_asked_for():
    """How near it comes is measured by `box.py --check`: a busy machine may be slower, and nothing makes it faster."""
    hosts = [BoxHost(cores=0.6, memory_bytes=96 << 20), BoxHost(cores=0.3)]
    with Box(hosts, bandwidth_bits_per_s=20e6, delay_s=3e-3) as box:
        found = [*check_links(box, stream_s=0.5), *check_cores(box, spin_s=0.8), *check_memory(box)]
    measured = {reading.what: reading.measured for reading in found}
    assert all(0 < measured[f"bandwidth {way}"] < 20 * 1.15 for way in ("0 → 1", "1 → 0"))
    assert 0 < measured["bandwidth of the slower way of 0 ⇄ 1"] < 20 * 1.15
    assert measured["round trip"] > 5.7
    assert 0 < measured["cores of a process on host 0"] < 0.6 * 1.15
    assert 0 < measured["cores of a process on host 1"] < 0.3 * 1.15
    assert measured["memory of host 0 when killed"] == pytest.approx(96, rel=0.1)


def test_two_hosts_train_what_one_process_trains_and_their_gradients_cross_the_cable(pair, tmp_path):
    before = pair.sent_bytes(0), pair.sent_bytes(1)
    train = [sys.executable, "-m", "paceline", "train", str(TOY), "--seed=3", "--layout=dp_replicate=2"]
    options = ["--precision=fp32", "--set=width=8000", "--steps=8", f"--out={tmp_path / 'run'}"]
    require_success(pair.start_workers([*train, *options], timeout_s=100))
    sent = [pair.sent_bytes(host) - b for host, b in enumerate(before)]
    events = read_events(tmp_path / "run")
    assert [host["name"] for host in of_kind(events, "run")[0]["cluster"]["hosts"]] == ["host0", "host1"]
    assert of_kind(events, "plan")[0]["transport"] == "gloo"
    assert of_kind(events, "proof")[0]["status"] == "equal"
    gradient_bytes = 4 * of_kind(events, "model")[0]["parameters"]
    steps = of_kind(events, "step")
    assert all(s >= len(steps) * gradient_bytes for s in sent)
    # No byte is faster than the cable.
    assert median(step["communication_s"] for step in steps) > 0.95 * 8 * gradient_bytes / _BITS_PER_S


def test_the_command_runs_a_plan_under_torchrun_which_measures_the_link_between_the_hosts(tmp_path):
    of_hosts = ["--hosts=2", "--cores=0.95", "--memory=1500M", "--bandwidth=100mbit"]
    box = [sys.executable, str(BENCHMARKS / "box.py"), *of_hosts, "--"]
    options = ["--budget=2", "--number=3", f"--out={tmp_path / 'plan'}"]
    plan = [sys.executable, "-m", "paceline", "plan", str(TOY), *options]
    process = subprocess.run([*box, *plan], capture_output=True, text=True, timeout=120, env=ENVIRONMENT, check=False)
    assert process.returncode == 0, process.stderr
    assert "host0 | The fastest of" in process.stdout
    assert "host1 | " not in process.stdout
    assert "host1 sent" in process.stdout
    linked = LinkedCluster.from_json(json.loads((tmp_path / "plan" / "cluster.json").read_text()))
    assert [host.name for host in linked.cluster.hosts] == ["host0", "host1"]
    assert {host.memory_bytes for host in linked.cluster.hosts} == {1500 << 20}
    assert linked.between is not None
    assert 0 < 8 * linked.between.bytes_per_s < _BITS_PER_S * 1.15
    told = json.loads((tmp_path / "plan" / "plan.json").read_text())
    assert [point["workers"] for point in told["curve"]["points"]] == [1, 2]


def test_what_fails_or_takes_too_long_is_ended_everywhere_and_said(pair):
    ended = pair.run(lambda host: ["sh", "-c", "echo begun; sleep 60"], timeout_s=0.5)
    assert [(end.exit_code, end.timed_out, end.stdout) for end in ended] == [(124, True, "begun\n")] * 2
    # What has left its process group is ended as well.
    stubborn = "setsid sh -c 'trap \"\" TERM; sleep 60' & exit 3"
    first, second = pair.run(lambda host: ["sh", "-c", stubborn if host else "true"], timeout_s=20)
    assert (first.exit_code, second.exit_code) == (0, 3)
    own = f"paceline-box-{os.getpid()}-"
    assert not kill_all([p for p in left_over() if p.name.startswith(own) and p.name.endswith("host1")])
    with pytest.raises(BoxError, match="host 1 ended with exit code 3"):
        require_success([first, second])


_TO_BE_KILLED = """
import json, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # programs in the background begin without
sys.path.insert(0, sys.argv[1])
from box import Box, BoxHost
with Box([BoxHost(cores=0.3)] * 2, bandwidth_bits_per_s=1e8, delay_s=1e-3) as box:
    paths = [str(path) for group in box._groups for path in group.directories]
    print(json.dumps([box._namespaces, paths]), flush=True)
    box.run(lambda host: ["sh", "-c", "setsid sleep 600 & sleep 600"], timeout_s=600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGINT])
def test_a_box_that_is_killed_leaves_nothing(number):
    maker = subprocess.Popen([sys.executable, "-c", _TO_BE_KILLED, str(BENCHMARKS)], stdout=subprocess.PIPE, text=True)
    with maker:
        assert maker.stdout is not None
        namespaces, directories = json.loads(maker.stdout.readline())
        groups = [Path(path) / "cgroup.procs" for path in directories]
        assert wait_for(lambda: all(len(group.read_text().split()) >= 3 for group in groups))
        inside = {int(pid) for group in groups for pid in group.read_text().split()}
        maker.send_signal(number)
    remaining = [Path(f"/proc/{pid}") for pid in (*namespaces, *inside)] + [Path(path) for path in directories]
    assert wait_for(lambda: not any(path.exists() for path in remaining)), [p for p in remaining if p.exists()]


def test_the_command_removes_what_the_dead_have_left_and_spares_the_living(pair):
    with subprocess.Popen(["true"]) as dead:
        dead.wait()
    parent = this_hierarchy().parents["memory"]
    left, used = parent / f"paceline-box-{dead.pid}-1-0-host0", parent / f"{new_name()}-host0"
    for path in (left, used):
        path.mkdir()
    try:
        clean = [sys.executable, str(BENCHMARKS / "box.py"), "--clean"]
        process = subprocess.run(clean, capture_output=True, text=True, timeout=60, check=True)
        assert process.stdout == f"removed {left}\n"
        assert not left.exists()
        assert used.exists()
    finally:
        for path in (left, used):
            if path.exists():
                path.rmdir()
    require_success(pair.run(lambda host: ["true"], timeout_s=10))
