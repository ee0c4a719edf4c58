"""Every way of splitting on CUDA, with workers that share the one GPU which a developer has (through_host.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from paceline.comm.world import listen_on_loopback
from paceline.records import Proof

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.timeout(400),
]
WORKER = Path(__file__).with_name("one_gpu_worker.py")
LAYOUTS = [
    "dp_replicate=2",
    "dp_shard=2,zero=2",
    "dp_shard=4",
    "tp=2,sequence=on",
    "pp=2,micro=2",
    "pp=2,micro=4,schedule=zb-h1",
    "pp=2,micro=4,schedule=zbv",
    "pp=2,dp_replicate=2,micro=2,recompute=selective",
    "dp_shard=2,tp=2,recompute=full",
    "pp=2,tp=2,micro=3",
]
PROVEN = [(name, layout) for name in ("transformer", "batch_norm", "deep") for layout in LAYOUTS]
ALONE = "dp_replicate=1"
TRAINED = [
    ("transformer", layout) for layout in (ALONE, "dp_replicate=2", "dp_shard=2", "tp=2", "pp=2,micro=2")
]


def run_workers(size: int, prove: list[Any], train: list[Any], limit_s: float = 350.0) -> dict[str, Any]:
    with listen_on_loopback(0) as listener:
        port = listener.getsockname()[1]
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), json.dumps([rank, size, port, prove, train])],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    try:
        told = [process.communicate(timeout=limit_s) for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * size, "\n".join(err for _, err in told)
    return json.loads(told[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_workers(4, PROVEN, TRAINED)


def test_they_are_on_the_gpu(found):
    assert found["device"] == "cuda:0"
    assert found["transport"] == "nccl"


@pytest.mark.parametrize(("name", "layout"), PROVEN)
def test_every_layout_is_proven(name, layout, found):
    proof = Proof.model_validate_json(found["proofs"][f"{name}/{layout}"])
    assert proof.status == "equal", proof.what_differs
    assert proof.compared > 10


@pytest.mark.parametrize(("name", "layout"), TRAINED)
def test_whole_runs_stay_together(name, layout, found):
    losses, alone = found["losses"][f"{name}/{layout}"], found["losses"][f"{name}/{ALONE}"]
    assert len(losses) > 3
    assert losses == pytest.approx(alone, rel=1e-3)
