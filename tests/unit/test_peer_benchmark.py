"""The arithmetic of benchmarks/peers.py: who is measured with whom, which losses are equal, what a failure was."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import peers
from peer_table import JobResult, Row, largest_distance, to_markdown
from turns import ProgramError

GIB = 1 << 30


def test_what_does_not_fit_together_is_measured_in_groups(monkeypatch):
    monkeypatch.setattr(peers, "available_memory_bytes", lambda kind: 20 * GIB)
    two = (2, ["a.py"], {})
    ways = {"ours": two, "a": two, "b": two, "c": (1, ["a.py"], {}), "d": two}
    # 14 GiB may be filled, ours takes 4 in each group: two others of 4 fit beside it, or one and a single one.
    groups = peers.in_groups(ways, 2 * GIB)
    assert [list(group) for group in groups] == [["ours", "a", "b", "c"], ["ours", "d"]]
    groups = peers.in_groups(ways, 4 * GIB)
    assert [list(group) for group in groups] == [["ours", "a"], ["ours", "b"], ["ours", "c"], ["ours", "d"]]


def test_losses_are_compared_by_their_largest_relative_distance():
    assert largest_distance([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert largest_distance([1.0, 2.2, 3.0], [1.0, 2.0, 4.0]) == pytest.approx(0.25)
    assert largest_distance([1.0, math.nan], [1.0, 2.0]) == math.inf
    with pytest.raises(ValueError, match="zip"):
        largest_distance([1.0], [1.0, 2.0])


def test_a_failure_is_named_by_its_last_error():
    log = "starting\nValueError: a first one\n  File x\nRuntimeError: what counts\nbye\n"
    assert ProgramError(["a"], log).reason == "RuntimeError: what counts"
    assert ProgramError(["a"], "starting\nkilled\n\n").reason == "killed"
    assert ProgramError(["a"], "").reason == "nothing in its log"


def test_means_leave_out_who_trains_something_else():
    rows = [
        Row("ours", step_s=[1.0], ratios=[1.0], distance=0.0),
        Row("like it", step_s=[4.0], ratios=[4.0], distance=1e-6),
        Row("wrong", step_s=[0.5], ratios=[0.5], distance=1e-2),
        Row("otherwise", step_s=[0.5], ratios=[0.5], distance=1e-2, other_training=True),
        Row("missing", note="not installed: x"),
    ]
    text = to_markdown([JobResult(name, "2 workers", 8, 1, rows) for name in ("a", "b")], [])
    assert "| like it | 4.00 | 2 |" in text
    assert "| wrong | – | 0 |" in text
    assert "**unequal** (1e-02)" in text
    assert "| otherwise | – | 0 |" in text
    assert "other training (1e-02)" in text
    assert "| missing | not installed: x | | | | |" in text
