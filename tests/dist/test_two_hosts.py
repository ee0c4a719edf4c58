"""Two hosts: network namespaces with addresses of their own, joined by a virtual cable."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from command import ENVIRONMENT, TOY, of_kind, paceline, read_events
from hierarchy_worker import LAYOUTS, TRAINED
from jobs import JOBS
from reference import train_plainly

_ADDRESSES = ("10.77.3.1", "10.77.3.2")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=20)


@pytest.fixture
def hosts() -> Iterator[tuple[str, str]]:
    if os.geteuid() != 0 or shutil.which("ip") is None:
        pytest.skip("NEEDS ROOT AND iproute2: two hosts are built from network namespaces")
    tag = uuid.uuid4().hex[:6]
    names = (f"pl-{tag}-a", f"pl-{tag}-b")
    made: list[str] = []
    try:
        try:
            for name in names:
                _ip("netns", "add", name)
                made.append(name)
        except subprocess.CalledProcessError as error:
            pytest.skip(f"NO NETWORK NAMESPACES HERE: {error.stderr}")
        _ip(
            "link",
            "add",
            "eth0",
            "netns",
            names[0],
            "type",
            "veth",
            "peer",
            "name",
            "eth0",
            "netns",
            names[1],
        )
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)


def start(host: str, node: int, per_host: int, *command: str) -> subprocess.Popen[str]:
    """What `torchrun … COMMAND` starts on one of two hosts."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
    rendezvous = [f"--nproc-per-node={per_host}", f"--master-addr={_ADDRESSES[0]}", "--master-port=29533"]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *torchrun, *rendezvous, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"},
    )


def start_training(host: str, node: int, per_host: int, out: Path, *more: str) -> subprocess.Popen[str]:
    command = ["-m", "paceline", "train", str(TOY), "--seed=3", "--timeout=60", f"--out={out}", *more]
    return start(host, node, per_host, *command)


def finish(processes: list[subprocess.Popen[str]]) -> None:
    try:
        for process in processes:
            output, error = process.communicate(timeout=150)
            assert process.returncode == 0, output + error
    finally:
        for process in processes:
            process.kill()


def losses(run: Path) -> torch.Tensor:
    return torch.tensor([step["loss"] for step in of_kind(read_events(run), "step")])


@pytest.fixture(scope="module")
def losses_alone(tmp_path_factory) -> torch.Tensor:
    """Those of one process."""
    out = tmp_path_factory.mktemp("alone") / "run"
    process = paceline("train", str(TOY), "--seed=3", "--layout=dp_replicate=1", f"--out={out}")
    assert process.returncode == 0, process.stderr
    return losses(out)


@pytest.mark.netns
def test_two_hosts_train_what_one_process_trains(hosts, tmp_path, losses_alone):
    # The run takes what is kept of this, unless the machine is busy: it need not measure for as long as it would.
    measure = ("-m", "paceline", "measure", str(TOY), "--seed=3", "--timeout=60", "--budget=2")
    finish([start(host, node, 1, *measure) for node, host in enumerate(hosts)])
    finish([start_training(host, node, 1, tmp_path / f"host{node}") for node, host in enumerate(hosts)])
    events = read_events(tmp_path / "host0")
    assert len(of_kind(events, "run")[0]["cluster"]["hosts"]) == 2
    assert {trial["workers"] for trial in of_kind(events, "trial")} == {1, 2}
    (plan,) = of_kind(events, "plan")
    if plan["layout"]["dp_replicate"] == 2:
        assert plan["transport"] == "gloo"
    torch.testing.assert_close(losses(tmp_path / "host0"), losses_alone, rtol=1e-4, atol=1e-5)


@pytest.mark.netns
@pytest.mark.shared_memory
def test_two_workers_on_each_of_two_hosts_train_what_one_process_trains(hosts, tmp_path, losses_alone):
    more = ("--layout=dp_replicate=4", "--precision=fp32")
    finish(
        [start_training(host, node, 2, tmp_path / f"host{node}", *more) for node, host in enumerate(hosts)]
    )
    events = read_events(tmp_path / "host0")
    assert of_kind(events, "plan")[0]["transport"] == "shared memory + gloo"
    assert not [m for m in of_kind(events, "message") if "gloo" in m["text"]]
    torch.testing.assert_close(losses(tmp_path / "host0"), losses_alone, rtol=1e-4, atol=1e-5)


@pytest.mark.netns
@pytest.mark.shared_memory
def test_hosts_of_two_send_the_bytes_that_are_said_and_train_in_every_layout(hosts, tmp_path):
    """The bytes, by their network interfaces: those of the docstring of `Hierarchy`, of both workers together."""
    num_bytes = 16 << 20
    command = (str(Path(__file__).parent / "hierarchy_worker.py"), str(num_bytes), str(tmp_path))
    finish([start(host, node, 2, *command) for node, host in enumerate(hosts)])
    for node in range(2):
        measured = json.loads((tmp_path / f"sent{node}.json").read_text())
        sent = {name: sent_bytes for name, (sent_bytes, _) in measured["shared memory + gloo"].items()}
        said = {"all-reduce": 1.0, "all-gather": 0.5, "reduce-scatter": 0.5, "broadcast": 1.0 - node}
        for name, share in said.items():
            # TCP's headers and answers, and two barriers.
            assert share * num_bytes <= sent[name] <= share * num_bytes * 1.03 + 200_000, name
        by_gloo = {name: sent_bytes for name, (sent_bytes, _) in measured["gloo"].items()}
        assert sent["all-reduce"] < 0.75 * by_gloo["all-reduce"]
        assert sent["reduce-scatter"] < 0.6 * by_gloo["reduce-scatter"]
    trained = torch.load(tmp_path / "losses.pt", weights_only=True)
    assert len(trained) == len(TRAINED) * len(LAYOUTS)
    for name in TRAINED:
        wanted = train_plainly(*JOBS[name], seed=7)["losses"]
        for layout in LAYOUTS:
            torch.testing.assert_close(trained[f"{name}/{layout}"], wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.netns
def test_a_cable_that_is_cut_ends_the_run_with_a_word(hosts, tmp_path, default_transport):
    """Nothing answers any more, and nothing says so: only the time-out can notice."""
    more = ("--layout=dp_replicate=2", "--steps=100000", "--set=step_s=0.02", "--timeout=8")
    processes = [
        start_training(host, node, 1, tmp_path / f"host{node}", *more) for node, host in enumerate(hosts)
    ]
    try:
        events = tmp_path / "host0" / "events.jsonl"
        deadline_s = time.monotonic() + 120
        while not (events.exists() and '"event": "evaluation"' in events.read_text()):
            assert time.monotonic() < deadline_s, "the training did not begin"
            time.sleep(0.2)
        _ip("-n", hosts[1], "link", "set", "eth0", "down")
        output, error = processes[0].communicate(timeout=100)
        told = [message["text"] for message in of_kind(read_events(tmp_path / "host0"), "message")]
        if default_transport != "gloo":
            assert "The workers talk through gloo: they are on several hosts." in told
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)
    assert processes[0].returncode != 0, output + error
    assert "paceline: rank 0: all-" in error
    assert "did not answer within 8 s" in error or "another worker is gone" in error
