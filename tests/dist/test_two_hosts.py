"""Two hosts: network namespaces with addresses of their own, joined by a virtual cable."""

from __future__ import annotations

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
        _ip("link", "add", "eth0", "netns", names[0], "type", "veth", "peer", "name", "eth0", "netns", names[1])
        for name, address in zip(names, _ADDRESSES, strict=True):
            _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
            _ip("-n", name, "link", "set", "eth0", "up")
            _ip("-n", name, "link", "set", "lo", "up")
        yield names
    finally:
        for name in made:
            subprocess.run(["ip", "netns", "delete", name], check=False, timeout=20)


def start(host: str, node: int, out: Path, *more: str) -> subprocess.Popen[str]:
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}"]
    rendezvous = ["--nproc-per-node=1", f"--master-addr={_ADDRESSES[0]}", "--master-port=29533"]
    command = ["-m", "paceline", "train", str(TOY), "--seed=3", "--timeout=60", f"--out={out}", *more]
    return subprocess.Popen(
        ["ip", "netns", "exec", host, *torchrun, *rendezvous, *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, "GLOO_SOCKET_IFNAME": "eth0"},
    )


@pytest.mark.netns
def test_two_hosts_train_what_one_process_trains(hosts, tmp_path):
    processes = [start(host, node, tmp_path / f"host{node}") for node, host in enumerate(hosts)]
    try:
        for process in processes:
            output, error = process.communicate(timeout=150)
            assert process.returncode == 0, output + error
    finally:
        for process in processes:
            process.kill()
    events = read_events(tmp_path / "host0")
    assert len(of_kind(events, "run")[0]["cluster"]["hosts"]) == 2
    assert {trial["workers"] for trial in of_kind(events, "trial")} == {1, 2}
    (plan,) = of_kind(events, "plan")
    if plan["layout"]["dp_replicate"] == 2:
        assert plan["transport"] == "gloo"
    alone = paceline("train", str(TOY), "--seed=3", "--layout=dp_replicate=1", f"--out={tmp_path / 'alone'}")
    assert alone.returncode == 0, alone.stderr
    found = torch.tensor([s["loss"] for s in of_kind(events, "step")])
    wanted = torch.tensor([s["loss"] for s in of_kind(read_events(tmp_path / "alone"), "step")])
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.netns
def test_a_cable_that_is_cut_ends_the_run_with_a_word(hosts, tmp_path):
    """Nothing answers any more, and nothing says so: only the time-out can notice."""
    more = ("--layout=dp_replicate=2", "--steps=100000", "--set=step_s=0.02", "--timeout=8")
    processes = [start(host, node, tmp_path / f"host{node}", *more) for node, host in enumerate(hosts)]
    try:
        events = tmp_path / "host0" / "events.jsonl"
        deadline_s = time.monotonic() + 120
        while not (events.exists() and '"event": "evaluation"' in events.read_text()):
            assert time.monotonic() < deadline_s, "the training did not begin"
            time.sleep(0.2)
        _ip("-n", hosts[1], "link", "set", "eth0", "down")
        output, error = processes[0].communicate(timeout=100)
        told = [message["text"] for message in of_kind(read_events(tmp_path / "host0"), "message")]
        assert "The workers talk through gloo: they are on several hosts." in told
    finally:
        for process in processes:
            process.kill()
            process.communicate(timeout=30)
    assert processes[0].returncode != 0, output + error
    assert "paceline: rank 0: all-" in error
    assert "did not answer within 8 s" in error or "another worker is gone" in error
