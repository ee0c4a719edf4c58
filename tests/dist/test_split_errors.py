"""A proof sees what is wrong with a split: errors that are planted in paceline are caught and named."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from paceline.records import Proof

PLANTED = [
    ("forget_a_reduction", "transformer", "tp=2", "gradient", "embedding.weight"),
    ("swap_heads", "transformer", "tp=2", "gradient", "blocks.0.attention.qkv.weight"),
    ("scale_wrongly", "transformer", "dp_shard=2", "gradient norm", None),
    ("lose_a_shard", "transformer", "dp_shard=2,zero=1", "gradient", None),
    ("keep_a_stale_tied_weight", "transformer", "pp=2,micro=2", "gradient", "embedding.weight"),
    ("mix_up_micro_batches", "transformer", "pp=2,micro=2", "loss", None),
]
RIGHT = [("nothing", "transformer", layout) for layout in ("tp=2", "dp_shard=2", "dp_shard=2,zero=1", "pp=2,micro=2")]


@pytest.fixture(scope="module")
def proofs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Proof]:
    directory = tmp_path_factory.mktemp("errors")
    asked, out = directory / "asked.json", directory / "proofs.json"
    asked.write_text(json.dumps([entry[:3] for entry in (*PLANTED, *RIGHT)]))
    worker = str(Path(__file__).parent / "split_error_worker.py")
    process = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", worker, asked, out],
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert process.returncode == 0, process.stderr[:6000]
    return {key: Proof.model_validate_json(text) for key, text in json.loads(out.read_text()).items()}


@pytest.mark.parametrize(("error", "job", "layout", "kind", "name"), PLANTED)
def test_a_planted_error_is_caught_and_named(error, job, layout, kind, name, proofs):
    proof = proofs[f"{error}/{layout}"]
    assert proof.status == "different"
    wrong = [d for d in proof.worst if not d.within_tolerance]
    assert kind in {d.kind for d in wrong}
    if name is not None:
        assert name in {d.name for d in wrong}, [d.describe() for d in wrong]


@pytest.mark.parametrize(("error", "job", "layout"), RIGHT)
def test_without_the_error_the_same_layout_is_equal(error, job, layout, proofs):
    assert proofs[f"{error}/{layout}"].status == "equal"
